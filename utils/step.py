"""One update: accumulation, precision, clipping, the masked step. The only place where a loss is differentiated."""

import logging
import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from utils.distributed import ALONE, World
from utils.losses import accuracy_of
from utils.optim import clip_by_global_norm

log = logging.getLogger(__name__)


class StepResult(NamedTuple):
    """What an update saw: 0-dimensional tensors on the device, to be read later, off the hot path."""
    loss: Tensor       # mean over the batch, before the update
    accuracy: Tensor   # on the same images
    grad_norm: Tensor  # global L2 norm of the mean gradient, unscaled, before clipping
    finite: Tensor     # 1.0: the update was made; 0.0: weights and momentum were left untouched
    scale: Tensor      # the loss scale that the update used; 1.0 without scaling
    share: Tensor      # of the images, that of the class predicted most often; 0.0 with several labels an image


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, images: Tensor,
               labels: Tensor, *, lr: float, micro_batches: int = 1, max_grad_norm: float = 1.0,
               precision: torch.dtype = torch.float32, dropout_seed: tuple[int, ...] = (0, 0),
               criterion: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy, world: World = ALONE) -> StepResult:
    """Images (B, 3, H, W), labels (B,) or (B, C) -> one update of the model's weights, in place.

    The batch is cut into `micro_batches` equal parts whose gradients are averaged, then clipped once, as in Google's
    `make_update_fn`. precision: float32 (or float64, the weights' own), or the type of autocast. dropout_seed: what
    the masks are drawn from, (seed, step, ...); each micro-batch adds its number. criterion: logits (B, C) and labels
    -> their mean loss. world: the processes that see the other parts of the batch; what is returned is of the whole.
    A gradient that is not finite masks the update on the device: nothing waits for it. ValueError: B is no multiple
    of micro_batches.
    """
    if len(images) % micro_batches:
        raise ValueError(f"A batch of {len(images)} images cannot be cut into {micro_batches} equal micro-batches.")
    device = images.device.type
    loss, accuracy = torch.zeros(2, device=images.device)
    predicted = torch.zeros(model.num_classes, device=images.device)  # share of the images, by class
    for number, (x, y) in enumerate(zip(images.chunk(micro_batches), labels.chunk(micro_batches))):
        seed_dropout(model, (*dropout_seed, number))
        with torch.autocast(device, dtype=precision, enabled=precision in (torch.bfloat16, torch.float16)):
            logits = model(x)
        logits = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
        part = criterion(logits, y) / micro_batches
        scaler.scale(part).backward()
        loss = loss + part.detach()
        accuracy = accuracy + accuracy_of(logits.detach(), y) / micro_batches
        if y.ndim == 1:
            predicted.index_add_(0, logits.detach().argmax(dim=1), predicted.new_ones(len(y)) / len(images))

    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    world.average([*gradients, loss, accuracy, predicted])
    scaler.unscale_(optimizer)
    norm = clip_by_global_norm(gradients, max_grad_norm)
    finite = torch.isfinite(norm) & torch.isfinite(loss)
    scale = scaler.scale(torch.ones((), device=images.device))
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.found_inf = (~finite).float()  # on the device: the fused kernels then change nothing
    optimizer.step()                         # not `scaler.step`, which would ask its own, narrower question
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return StepResult(loss, accuracy, norm, finite.float(), scale, predicted.max())


def seed_dropout(model: nn.Module, numbers: tuple[int, ...]) -> None:
    """Makes the dropout masks of the next forward pass a function of `numbers` alone (seed, step, micro-batch, rank).

    Google repeats one mask for all micro-batches of an update; here each has its own, as one large batch would.
    """
    if model.config.dropout_rate or model.config.attention_dropout_rate:
        torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1))


def make_scaler(device: str, precision: torch.dtype, loss_scale: float = 0.0) -> torch.amp.GradScaler:
    """The loss scale of float16 (idle in other precisions). 0: dynamic, from 2^16; otherwise fixed at that value."""
    enabled = precision == torch.float16
    if loss_scale:
        return torch.amp.GradScaler(device, init_scale=loss_scale, growth_factor=1.0 + 1e-9, backoff_factor=1.0 - 1e-9,
                                    enabled=enabled)
    return torch.amp.GradScaler(device, enabled=enabled)


def choose_device(name: str, local_rank: int = -1) -> torch.device:
    """auto: the GPU where there is one. ValueError: cuda was asked for and there is none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda was asked for, but PyTorch sees no GPU here. Use --device cpu or auto.")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise ValueError(f"--local_rank {local_rank} asks for a GPU that is not there: there are "
                         f"{torch.cuda.device_count()}, counted from 0.")
    device = torch.device("cuda", max(local_rank, 0))
    torch.cuda.set_device(device)            # events and streams without a device mean this one
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32: convolutions too
    return device


def make_deterministic() -> None:
    """Only kernels whose result does not depend on the order in which a GPU's threads come: slower, bit-equal runs.

    An operation that has none makes PyTorch say so. cuBLAS reads its variable when it starts.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def choose_precision(settings, device: torch.device) -> torch.dtype:
    """The type of the forward and backward pass on this device; a choice that was not asked for is said."""
    asked = "fp16" if settings.fp16 else "bf16" if settings.bf16 else settings.precision
    if asked == "fp32":
        return torch.float32
    if device.type == "cuda":
        if asked == "auto":
            asked = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        return {"bf16": torch.bfloat16, "fp16": torch.float16}[asked]
    native = _cpu_has_bf16()
    if asked == "fp16":
        log.info("A CPU has no use for float16: %s.", "bfloat16 instead, which this one computes natively" if native
                 else "float32 instead, as this one has no native bfloat16")
    return torch.bfloat16 if native or asked == "bf16" else torch.float32


def attention_kernel(model: nn.Module, device: torch.device, precision: torch.dtype):
    """A context that picks the kernel of `scaled_dot_product_attention` where PyTorch's choice is the slower one.

    On a CPU in bfloat16 with few tokens the plain products beat the fused kernel (`bench/README.md`); their memory,
    B x H x T x T, is small there.
    """
    if device.type == "cpu" and precision == torch.bfloat16 and model.pos_embed.shape[1] <= 128:
        return sdpa_kernel(SDPBackend.MATH)
    return nullcontext()


def _cpu_has_bf16() -> bool:
    """Whether the processor multiplies bfloat16 natively (AVX512-BF16, AMX, Arm); elsewhere float32 is faster."""
    try:
        words = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return False  # no Linux: float32 is the safe choice
    return bool(words & {"avx512_bf16", "amx_bf16", "bf16"})
