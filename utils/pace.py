"""How fast a training step is on this device: measured on random images, for estimates of what a run will take."""

import time
from statistics import median

import torch

from models.modeling import VisionTransformer
from utils import resources
from utils.device import Computing
from utils.optim import make_optimizer
from utils.step import make_scaler, train_step

SECONDS = 2.0   # that a measured step should take at most
MOST = 128      # images in it
STEPS = 5       # of which the median counts, after one that warms up


def images_per_second(config, size: tuple[int, int], settings, computing: Computing) -> float:
    """Of training with SGD, by one process: the median of STEPS steps of as many images as fit into memory and SECONDS.

    settings: whose optimiser and precision the run would have. RuntimeError: not one image fits.
    """
    device = computing.device
    model = VisionTransformer(config, size, 10).to(device).train()
    optimizer, scaler = make_optimizer(model, "sgd"), make_scaler(device.type, computing.precision)

    def step(images: int) -> float:
        """Seconds."""
        x = torch.rand(images, config.in_chans, *size, device=device) * 2 - 1
        began = time.perf_counter()
        loss = train_step(model, optimizer, scaler, x, torch.zeros(images, dtype=torch.int64, device=device), lr=0.0,
                          precision=computing.precision).loss
        loss.item()  # waits for the device
        return time.perf_counter() - began
    free = resources.free_memory(device)

    def fits(images: int) -> bool:
        needs = resources.activations(model, images, computing.precision, device)
        return free is None or needs < free / 2
    step(1)
    wanted = max(int(SECONDS / step(1)), 1)
    images = next(n for n in (128, 64, 32, 16, 8, 4, 2, 1) if n == 1 or (n <= min(wanted, MOST) and fits(n)))
    step(images)
    rate = images / median(step(images) for _ in range(STEPS))
    if device.type == "cuda":  # whose memory the runs are about to need
        del model, optimizer
        torch.cuda.empty_cache()
    return rate
