"""What this machine computes with: device, precision, memory."""

import ctypes
import logging
import os
import time
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from torch.utils._triton import has_triton

from models.kernels import processor

log = logging.getLogger(__name__)

UTILISATION = 0.4      # of a GPU's matrix rate, that an eager run reaches: a guess until a GPU has been measured
CPU_UTILISATION = 0.6  # of a CPU's: ViT-demo 0.57, ViT-B_16 0.85 (bench/results/2026-11-21-amd-epyc-2.json)
COMPILED_SAVES = 0.15  # of the time, by compiling: likewise
COMPILING = 30         # seconds: likewise
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's numbers for `mallopt`


def choose_device(name: str, local_rank: int = -1) -> torch.device:
    """auto: the GPU where there is one. ValueError: cuda was asked for and there is none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda was asked for, but PyTorch sees no GPU here. Use --device cpu or auto.")
    if name == "cpu" or not torch.cuda.is_available():
        keep_memory()
        fit_threads()
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise ValueError(f"--local_rank {local_rank} asks for a GPU that is not there: there are "
                         f"{torch.cuda.device_count()}, counted from 0.")
    device = torch.device("cuda", max(local_rank, 0))
    torch.cuda.set_device(device)            # events and streams without a device mean this one
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32: convolutions too
    return device


class Computing(NamedTuple):
    """What computes a run, and how."""
    device: torch.device
    precision: torch.dtype   # of the matrix products
    processes: int = 1
    compiled: bool = False

    def in_words(self) -> dict:
        """As settings and files have it: {"device": "cpu", "precision": "bfloat16", "compile": "off"}."""
        return {"device": str(self.device), "precision": str(self.precision).removeprefix("torch."),
                "compile": "on" if self.compiled else "off"}


def choose_compile(asked: str, model, device: torch.device, images: int) -> bool:
    """Whether the blocks of a run that trains on so many images are to be compiled; a choice not asked for is said.

    auto: on a GPU that torch.compile can write for, if what it saves is more than the time that it takes itself.
    """
    if asked != "auto":
        return asked == "on"
    if device.type != "cuda" or not has_triton():
        return False
    seconds = images * training_flops(model) / (UTILISATION * matrix_rate(device))
    if COMPILED_SAVES * seconds <= COMPILING:
        return False
    log.info("compile  the blocks, as this run is long enough to earn that back (--compile off prevents it)")
    return True


def compile_blocks(model, **options) -> None:
    """torch.compile of each block in place, so that names and states stay what they are; all but the last are the same
    program, compiled once. A hybrid's stem is compiled, too. options: torch.compile's."""
    for block in model.blocks:
        block.compile(**options)
    if model.config.resnet is not None:
        model.patch_embed.compile(**options)


def training_flops(model) -> float:
    """Floating-point operations of one image, forwards and twice that backwards: matrix products of patches, blocks and
    head (2 per multiplication), without a hybrid's ResNet. ViT-B_16 at 224 px: 105 GFLOP."""
    config, tokens = model.config, model.pos_embed.shape[1]
    D = config.hidden_size
    block = tokens * (4 * D * D + 2 * D * config.mlp_dim) + 2 * tokens * tokens * D
    patches = model.grid[0] * model.grid[1] * model.patch_embed.proj.weight.numel()
    return 6 * (config.num_layers * block + patches + D * model.num_classes)


def training_seconds(model, images: int, computing: Computing) -> float:
    """About how long a run on so many images takes by its matrix products, without its evaluations."""
    device = computing.device
    rate = matrix_rate(device) if device.type == "cuda" else _cpu_matrix_rate(computing.precision)
    usable = UTILISATION if device.type == "cuda" else CPU_UTILISATION
    return images * training_flops(model) / (usable * rate * computing.processes)


def _cpu_matrix_rate(precision: torch.dtype) -> float:
    """FLOP/s of a product that no longer fits into the caches: the median of 5."""
    a, b = (torch.ones(1536, 1536, dtype=precision) for _ in range(2))  # not random: no generator is touched
    moments = []
    for _ in range(7):
        a @ b
        moments.append(time.perf_counter())
    return 2 * 1536**3 / median(end - start for start, end in pairwise(moments[1:]))


def matrix_rate(device: torch.device) -> float:
    """FLOP/s of a large bfloat16 product on random data on a GPU: the median of 10."""
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    events = [torch.cuda.Event(enable_timing=True) for _ in range(13)]
    for event in events:
        a @ b
        event.record()
    events[-1].synchronize()
    times = [start.elapsed_time(end) for start, end in pairwise(events[2:])]  # milliseconds
    return 2 * 8192**3 / (median(times) / 1000)


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


def _cpu_has_bf16() -> bool:
    """Whether the processor is known to multiply bfloat16 natively (AVX512-BF16, AMX, Arm); elsewhere float32 is
    faster."""
    return bool(processor() & {"avx512_bf16", "amx_bf16", "bf16"})


def keep_memory() -> None:
    """Tells glibc to keep what is freed, instead of handing large blocks back to the system and fetching them anew at
    every step: each page of theirs would be cleared again (`bench/README.md`). Elsewhere nothing happens.
    """
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def fit_threads(limit: Path = Path("/sys/fs/cgroup/cpu.max")) -> None:
    """As many threads as the processors that a container may use (`docker --cpus 4`), which PyTorch does not look at:
    more would only wait for one another. OMP_NUM_THREADS wins."""
    with suppress(OSError, ValueError):  # no such system, or no limit ("max")
        quota, period = map(int, limit.read_text().split())
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(min(torch.get_num_threads(), -(-quota // period)))
