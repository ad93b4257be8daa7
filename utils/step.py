"""One update: accumulation, precision, clipping, the masked step. The only place where a loss is differentiated."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from utils.distributed import ALONE, World
from utils.fitting import Fitting, meeting
from utils.losses import accuracy_of
from utils.optim import clip_by_global_norm

AHEAD = 6  # batches that a GPU holds at most: the one in use, and those that `Progress` lets the host be ahead by


class StepResult(NamedTuple):
    """What an update saw: 0-dimensional tensors on the device, to be read later, off the hot path."""
    loss: Tensor       # mean over the batch, before the update
    accuracy: Tensor   # on the same images
    grad_norm: Tensor  # global L2 norm of the mean gradient, unscaled, before clipping
    finite: Tensor     # 1.0: the update was made; 0.0: weights and momentum were left untouched
    scale: Tensor      # the loss scale that the update used; 1.0 without scaling
    share: Tensor      # of the images, that of the class predicted most often; 0.0 with several labels an image


def train_step(network: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, images: Tensor,
               labels: Tensor, *, lr: float, micro_batches: int | Fitting = 1, max_grad_norm: float = 1.0,
               precision: torch.dtype = torch.float32, dropout_seed: tuple[int, ...] = (0, 0),
               criterion: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy, world: World = ALONE) -> StepResult:
    """Images (B, 3, H, W), labels (B,) or (B, C) -> one update of the model's weights, in place.

    network: the model, or DDP around it (`World.parallel`). The batch is cut into `micro_batches` equal parts whose
    gradients are averaged, then clipped once, as in Google's `make_update_fn`; an automatic `Fitting` cuts finer where
    memory runs out, and the step is done again from its beginning. precision: float32 (or float64, the weights' own),
    or the type of autocast. dropout_seed: what the masks are drawn from, (seed, step, ...); each
    micro-batch adds its number. criterion: logits (B, C) and labels -> their mean loss. world: the processes that see
    the other parts of the batch; what is returned is of the whole. A gradient that is not finite masks the update on
    the device: nothing waits for it. ValueError: B is no multiple of micro_batches, or not one image fits into memory.
    """
    fitting = micro_batches if isinstance(micro_batches, Fitting) else Fitting(micro_batches)
    if len(images) % fitting.parts:
        raise ValueError(f"A batch of {len(images)} images cannot be cut into {fitting.parts} equal micro-batches.")
    clear = partial(optimizer.zero_grad, set_to_none=True)
    clear()
    loss, accuracy, predicted = fitting.run(
        lambda parts: accumulate(network, scaler, images, labels, parts, precision, dropout_seed, criterion),
        clear, len(images), step=dropout_seed[1])
    world.average([loss, accuracy, predicted])  # the gradients are averaged already
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    scaler.unscale_(optimizer)
    norm = clip_by_global_norm(gradients, max_grad_norm)
    finite = torch.isfinite(norm) & torch.isfinite(loss)
    scale = scaler.scale(torch.ones((), device=images.device))
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.found_inf = (~finite).float()  # on the device: the fused kernels then change nothing
    optimizer.step()                         # not `scaler.step`, which would ask its own, narrower question
    scaler.update()
    clear()
    return StepResult(loss, accuracy, norm, finite.float(), scale, predicted.max())


def accumulate(network: nn.Module, scaler: torch.amp.GradScaler, images: Tensor, labels: Tensor, micro_batches: int,
               precision: torch.dtype, dropout_seed: tuple[int, ...], criterion) -> tuple[Tensor, Tensor, Tensor]:
    """Adds the gradient of the batch's mean scaled loss to `.grad`; returns loss, accuracy and, for each class, the
    share of images that were given it (zeros with several labels an image). Processes meet in the last part alone."""
    model = getattr(network, "module", network)
    loss, accuracy = torch.zeros(2, device=images.device)
    predicted = torch.zeros(model.num_classes, device=images.device)
    half, several = precision in (torch.bfloat16, torch.float16), isinstance(network, DistributedDataParallel)
    for number, (x, y) in enumerate(zip(images.chunk(micro_batches), labels.chunk(micro_batches))):
        seed_dropout(model, (*dropout_seed, number))
        inner = several and number < micro_batches - 1
        with network.no_sync() if inner else meeting(several, micro_batches, len(images)):
            with torch.autocast(images.device.type, dtype=precision, enabled=half):
                logits = network(x)
            logits = logits.float() if half else logits
            part = criterion(logits, y) / micro_batches
            scaler.scale(part).backward()
        loss = loss + part.detach()
        if y.ndim == 2 and not getattr(criterion, "multi_label", True):
            y = y.argmax(dim=1)  # of a mixed image the class that has the larger share
        accuracy = accuracy + accuracy_of(logits.detach(), y) / micro_batches
        if y.ndim == 1:
            predicted.index_add_(0, logits.detach().argmax(dim=1), predicted.new_ones(len(y)) / len(images))
    return loss, accuracy, predicted


def rehearse(model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, labels: Tensor,
             precision: torch.dtype, criterion: Callable[[Tensor, Tensor], Tensor], world: World,
             micro_batches: int) -> None:
    """Takes the memory of an update by as many images as there are labels (n,) or (n, C), gives it back, and changes no
    weight. Of the micro-batches, of black images, two are enough: gradients are there in the second. Beside them lie
    the copies that several processes send one another (DDP's buckets)."""
    parts, device = min(micro_batches, 2), labels.device
    some = len(labels) // micro_batches * parts
    try:
        batches = torch.zeros(AHEAD, len(labels), model.config.in_chans, *model.img_size, device=device)
        copies = 2 * (not optimizer.state) + (world.size > 1)  # Adam's are made in the first update
        beside = [torch.empty_like(p) for p in model.parameters() if p.requires_grad for _ in range(copies)]
        accumulate(model, scaler, batches[0, :some], labels[:some], parts, precision, (0, 0), criterion)
        del batches, beside  # which had to be there till now
    finally:
        optimizer.zero_grad(set_to_none=True)


def seed_dropout(model: nn.Module, numbers: tuple[int, ...]) -> None:
    """Makes the masks of dropout and stochastic depth in the next forward pass a function of `numbers` alone (seed,
    step, micro-batch, rank).

    Google repeats one mask for all micro-batches of an update; here each has its own, as one large batch would.
    """
    config = model.config
    if config.dropout_rate or config.attention_dropout_rate or config.drop_path_rate:
        torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1))


def make_scaler(device: str, precision: torch.dtype, loss_scale: float = 0.0) -> torch.amp.GradScaler:
    """The loss scale of float16 (idle in other precisions). 0: dynamic, from 2^16; otherwise fixed at that value."""
    enabled = precision == torch.float16
    if loss_scale:
        return torch.amp.GradScaler(device, init_scale=loss_scale, growth_factor=1.0 + 1e-9, backoff_factor=1.0 - 1e-9,
                                    enabled=enabled)
    return torch.amp.GradScaler(device, enabled=enabled)
