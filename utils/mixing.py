"""Mixup (Zhang et al. 2018, arXiv 1710.09412) and CutMix (Yun et al. 2019, arXiv 1905.04899) of a batch on the device.

As in both papers' code and in torchvision.transforms.v2, a batch has one weight, from Beta(alpha, alpha), and one box.
The partners are another matter: torchvision mixes each image with the one before it, which may lie in another process's
share. Here images 2j and 2j + 1 of the global batch are mixed with one another. Their order is random, so any fixed
pairs will do (timm pairs the first with the last), and with an even number of images in each process's share no pair is
ever cut: each process mixes what it has decoded itself, and a batch is the same for any number of processes. Mixed
once, images may be cut into micro-batches at will.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Mix(NamedTuple):
    """How a batch is mixed."""
    weight: float  # the image's own share in its pixels (mixup) or area (CutMix), and in its target
    box: tuple[int, int, int, int] | None = None  # top, left, bottom, right of what shows the partner; None: mixup


def draw(rng: np.random.Generator, size: tuple[int, int], mixup: float = 0.8, cutmix: float = 1.0,
         cutmix_chance: float = 0.5) -> Mix:
    """How a batch of images of `size` (H, W) is mixed, the same in every process.

    mixup, cutmix: alpha of their Beta distributions, 0 for never; with both, a batch gets CutMix with cutmix_chance.
    With neither, the weight is 1. ValueError: a number out of range.
    """
    if min(mixup, cutmix) < 0 or not 0 <= cutmix_chance <= 1:
        raise ValueError(f"Mixup's alpha is {mixup:g}, CutMix's {cutmix:g} and the chance of CutMix {cutmix_chance:g}: "
                         "an alpha is 0 or more, a chance 0 to 1.")
    if cutmix and (not mixup or rng.random() < cutmix_chance):
        return cut(rng.beta(cutmix, cutmix), int(rng.integers(size[0])), int(rng.integers(size[1])), size)
    return Mix(rng.beta(mixup, mixup) if mixup else 1.0)


def cut(weight: float, row: int, column: int, size: tuple[int, int]) -> Mix:
    """CutMix with a box around (row, column) that would leave `weight` of the image. At the edges it loses what lies
    outside, and whole pixels round it down: the weight becomes that of the area that is left in fact."""
    half = [int(0.5 * (1 - weight) ** 0.5 * side) for side in size]
    top, left = (max(at - h, 0) for at, h in zip((row, column), half))
    bottom, right = (min(at + h, side) for at, h, side in zip((row, column), half, size))
    return Mix(1 - (bottom - top) * (right - left) / (size[0] * size[1]), (top, left, bottom, right))


@torch.no_grad()
def mix(images: Tensor, labels: Tensor, how: Mix, num_classes: int) -> tuple[Tensor, Tensor]:
    """One process's share of a batch: images (B, C, H, W) float, labels (B,) or (B, classes) -> both mixed.

    The labels come back as float32 (B, num_classes): of one class an image, rows that sum to one; of several, each
    class's share in the two. Smoothing comes after, in the loss: smoothing is linear, so the order does not matter.
    ValueError: B is odd, so that an image has no partner.
    """
    if len(images) % 2:
        raise ValueError(f"Images are mixed in pairs, and {len(images)} images are an odd number: choose a batch size "
                         "that gives each process an even number.")
    if how.box is None:
        mixed = torch.lerp(_partners(images), images, how.weight)
    else:
        top, left, bottom, right = how.box
        mixed = images.clone()
        mixed[:, :, top:bottom, left:right] = _partners(images[:, :, top:bottom, left:right])
    targets = soft(labels, num_classes)
    return mixed, torch.lerp(_partners(targets), targets, how.weight)


def soft(labels: Tensor, num_classes: int) -> Tensor:
    """Class numbers (B,) -> float32 (B, num_classes) of 0 and 1; labels (B, num_classes) as float32."""
    if labels.ndim == 2:
        return labels.float()
    return (labels[:, None] == torch.arange(num_classes, device=labels.device)).float()  # `one_hot` may ask the device


def _partners(batch: Tensor) -> Tensor:
    """Each pair the other way round."""
    return batch.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
