"""What a run needs of memory and of the disk, estimated before it starts."""

import os
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.kernels import MANY_TOKENS
from models.modeling_resnet import stem

SLACK = 1.3         # of activations: no allocator fills every gap, and kernels need room of their own
FLOAT = 4           # bytes of a number where nothing is said of its precision
MOMENTS = {"sgd": 1, "adam": 2, "adamw": 2}  # that an optimiser keeps of each weight
LINE = 180          # bytes that one value takes in metrics.jsonl and in TensorBoard's file together
VALUES = 5          # that an update writes there
FULL = ("can't allocate memory", "not enough memory", "out of memory", "std::bad_alloc", "CUBLAS_STATUS_ALLOC_FAILED",
        "CUDNN_STATUS_ALLOC_FAILED")  # in a RuntimeError of PyTorch's


class Memory(NamedTuple):
    """Bytes at the peak of a training step."""
    weights: int      # with their copies in the precision of autocast, and their average
    optimizer: int
    batch: int        # the images of the whole update
    activations: int  # of one micro-batch: what the forward pass keeps, and the backward pass needs beside it
    gradients: int    # with one micro-batch only what exceeds the activations, whose room they take; of several
                      # processes also the copies that they send

    @property
    def total(self) -> int:
        return sum(self)


def memory(model, settings, precision: torch.dtype, device: torch.device, processes: int, parts: int) -> Memory:
    """The peak of a training step in each process, without the program itself and the data set kept in memory.

    parts: micro-batches.

    Measured on a CPU (resident set, two updates; AMD EPYC, torch 2.15; ViT-demo, -Ti_16, -S_16, batches of 32 and 96,
    float32 and bfloat16): the estimate was 1.09 to 1.32 times the peak, with gradient checkpointing 0.77 to 1.30 times.
    Not measured on GPUs.
    """
    images = settings.train_batch_size // processes
    numbers = sum(p.numel() for p in model.parameters())
    narrow = 0 if precision == torch.float32 else precision.itemsize
    moment = 2 if settings.momentum_dtype == "bfloat16" else FLOAT
    pixels = model.config.in_chans * model.img_size[0] * model.img_size[1]
    kept = activations(model, images // parts, precision, device)
    gradients, sent = numbers * FLOAT, numbers * FLOAT * (processes > 1)  # DDP's buckets; a whole batch's lie in them
    weights = numbers * (FLOAT + narrow + FLOAT * bool(settings.ema or settings.swa))  # and their average
    own = gradients if parts > 1 else 0 if sent else max(gradients - kept, 0)
    return Memory(weights=weights, optimizer=numbers * moment * MOMENTS[settings.optimizer],
                  batch=images * pixels * FLOAT, activations=kept, gradients=own + sent)


def activations(model, images: int, precision: torch.dtype, device: torch.device) -> int:
    """Bytes that so many images take between the forward and the backward pass, and for one block's way back.

    A token leaves in each block, with n bytes a number (2 under autocast, whose residual stream stays float32): its
    residual twice (2 D floats), both norms' outputs, query, key, value and the heads' output (6 D n), the MLP before
    and after the GELU (2 M n); dropout its masks. PyTorch's `saved_tensors_hooks` counts the same, to 1 %.
    """
    config, n = model.config, precision.itemsize
    T, D, M, H = model.pos_embed.shape[1], config.hidden_size, config.mlp_dim, config.num_heads
    block = 2 * D * FLOAT + (6 * D + 2 * M) * n + (H + 4) * FLOAT  # the last: sums of softmax and norms
    if config.dropout_rate:
        block += (2 * D + M) * (1 if device.type == "cuda" else n)
    if device.type == "cpu" and precision == torch.bfloat16 and T <= MANY_TOKENS:  # plain products keep their table
        block += H * T * n
    back = 2 * M * n + 2 * D * FLOAT
    last = D * FLOAT + 3 * D * n if config.classifier == "token" else block  # of most rows only keys and values
    layers = (config.num_layers - 1) * block + last
    if model.gradient_checkpointing:  # of each block what goes in, and one that is computed anew
        gaps = 4 if device.type == "cpu" else 1  # measured: the heap keeps room around what stays
        layers = config.num_layers * gaps * D * FLOAT + block
    token = layers + 3 * D * FLOAT + back
    pixels = config.in_chans * model.img_size[0] * model.img_size[1]
    image = T * token + pixels * n + 3 * model.num_classes * FLOAT + _stem(config, model.img_size)
    return int(SLACK * images * image)


def _stem(config, size: tuple[int, int]) -> int:
    """Bytes that a hybrid's ResNet keeps of one more image: counted on tensors without memory."""
    if config.resnet is None:
        return 0
    with torch.device("meta"):
        net = stem(config.resnet, config.in_chans, config.norm_eps)
        one, two = (_kept(net, torch.empty(images, config.in_chans, *size)) for images in (1, 2))
    return two - one  # without its standardised kernels, which are kept once


def _kept(net: nn.Module, images: Tensor) -> int:
    """Bytes of the different tensors that a forward pass keeps for the backward pass."""
    kept = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        net(images)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def free_memory(device: torch.device, container: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that are free on the device, and that a container with a limit (`docker --memory`) may still take; None
    where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None
    with suppress(OSError, ValueError, StopIteration):  # no container, or no limit ("max")
        limit, used = (int((container / name).read_text()) for name in ("memory.max", "memory.current"))
        lines = (container / "memory.stat").read_text().splitlines()
        cache = next(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))  # given back at need
        free = min(free, max(limit - used + cache, 0))
    return free


def room(device: torch.device) -> int:
    """Bytes of a GPU that this process has or may still take, also under a memory fraction."""
    free, total = torch.cuda.mem_get_info(device)
    fraction = getattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 1.0)(device)  # older ones lack it
    return min(free + torch.cuda.memory_reserved(device), int(fraction * total))


def peak_memory(device: torch.device) -> int | None:
    """Bytes at most so far: of tensors on a GPU, of the whole process on a CPU; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def out_of_memory(error: BaseException) -> bool:
    """Whether this is how PyTorch or Python say that there is no memory left, of a GPU or of the machine."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in FULL))


def disk(model: nn.Module, settings) -> int:
    """Bytes of a run's outputs at most: the state (weights, optimiser, best weights) in two generations and a third
    while it is written, the weights of `last` and `best` and one while it is written, and the metrics."""
    weights = sum(p.numel() for p in model.parameters()) * FLOAT
    moment = 2 if settings.momentum_dtype == "bfloat16" else FLOAT
    average = weights * bool(settings.ema or settings.swa)
    state = 2 * weights + average + weights // FLOAT * moment * MOMENTS[settings.optimizer]
    return 3 * state + 3 * weights + average + settings.num_steps * VALUES * LINE


def free_disk(folder: Path) -> int:
    """Bytes that may be written below `folder`, which may not be there yet: free, or of a run that it replaces."""
    there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.is_dir())
    replaced = (entry.stat().st_size for entry in os.scandir(folder) if entry.is_file()) if folder.is_dir() else ()
    return shutil.disk_usage(there).free + sum(replaced)


def amount(size: float) -> str:
    """Bytes in words: 512 B, 3.1 MiB, 20 GiB."""
    unit, *larger = "B", "KiB", "MiB", "GiB", "TiB"
    while size >= 1000 and larger:
        size, unit = size / 1024, larger.pop(0)
    return f"{size:.3g} {unit}" if size < 1000 else f"{size:.0f} {unit}"
