"""What a measurement was made on, and what there was to reach: `python bench/hardware.py [cpu|cuda]` prints JSON.

Nothing heavy is imported here, as a process starts with the memory record of the one that started it.
"""

import json
import os
import re
import sys
import time
from contextlib import suppress
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bench.load import processor

FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "bf16")
PACKAGES = ("torch", "torchvision", "timm", "transformers", "numpy", "pillow", "triton")


def machine() -> dict:
    """The processor, as far as Linux tells, and how busy it was when this began."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""

    def entry(name: str) -> str:
        found = re.search(rf"^(?:{name})\s*:\s*(.+)$", text, re.MULTILINE)
        return found[1] if found else ""
    words = set(entry("flags|Features").split())
    return {"processor": processor(), "vendor": entry("vendor_id"), "family": entry("cpu family"),
            "model": entry("model"), "flags": [flag for flag in FLAGS if flag in words], "cores": os.cpu_count(),
            "load": list(os.getloadavg()), "python": sys.version.split()[0]}


def versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def slug(text: str) -> str:
    """A name that a file can have: 'NVIDIA H200' -> nvidia-h200."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


# --- heavy, for processes of their own --------------------------------------------------------------------------------

def seconds(work, repeats: int, device: str) -> float:
    """Mean seconds of so many calls after three others; the device has then finished."""
    import torch

    def wait():
        if device == "cuda":
            torch.cuda.synchronize()
    for _ in range(3):
        work()
    wait()
    start = time.perf_counter()
    for _ in range(repeats):
        work()
    wait()
    return (time.perf_counter() - start) / repeats


def rates(device: str, tiny: bool = False) -> dict:
    """FLOP/s of a large product of random bfloat16 matrices and of float32 ones, bytes/s of a copy (read and
    written), and the threads."""
    import torch

    n = 8192 if device == "cuda" else 256 if tiny else 2048
    found = {"threads": torch.get_num_threads(), "capability": torch.backends.cpu.get_cpu_capability()}
    for name, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        found[f"{name} FLOP/s"] = 2 * n**3 / seconds(partial(torch.matmul, a, b), 10, device)
    size = (4 << 30) if device == "cuda" else (1 << 20) if tiny else (256 << 20)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    found["copy B/s"] = 2 * size / seconds(partial(target.copy_, source), 10, device)
    return found


def look(device: str, tiny: bool = False) -> dict:
    """The device that `auto` means here, its name and its rates."""
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("PyTorch sees no GPU here.")
    about = {"device": device, "tiny": tiny, **rates(device, tiny)}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        about |= {"gpu": properties.name, "gpu bytes": properties.total_memory, "cuda": torch.version.cuda,
                  "multiprocessors": properties.multi_processor_count}
    return about


def forward_flops(name: str, size: int, classes: int = 10) -> float:
    """Floating-point operations of one image's forward pass, two for each multiplication and addition: matrix products
    and convolutions, all tokens in all blocks (whoever skips some does not get a smaller count)."""
    import torch

    from models.configs import get_config
    from models.modeling import VisionTransformer
    from utils.device import training_flops

    config = get_config(name)
    with torch.device("meta"):
        model = VisionTransformer(config, size, classes)
    return training_flops(model) / 3 + (stem_flops(config, size) if config.resnet is not None else 0.0)


def stem_flops(config, size: int) -> float:
    """Of a hybrid's ResNet, counted by PyTorch on tensors without memory."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from models.modeling_resnet import stem

    with torch.device("meta"):
        net = stem(config.resnet, config.in_chans, config.norm_eps)
        with FlopCounterMode(display=False) as counter:
            net(torch.empty(1, config.in_chans, size, size))
    return float(counter.get_total_flops())


if __name__ == "__main__":
    print(json.dumps(look(sys.argv[1] if len(sys.argv) > 1 else "auto", "--tiny" in sys.argv)))
