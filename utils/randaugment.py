"""RandAugment (Cubuk et al. 2020, arXiv 1909.13719) of a whole batch on the device, as in torchvision.transforms.v2.

Each image gets `num_ops` of 14 operations, one after the other. They are drawn on the host, so it is known there which
images stand together for an operation, and nothing waits for the device. It works on pixels, uint8 on the scale 0 to
255, after crop and flip and before the normalisation: the type for which torchvision, too, defines it. All sums over
pixels are of whole numbers, so an image has the same bits in whatever batch it comes.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

GEOMETRIC = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")      # new places for pixels
TABLES = ("Brightness", "Contrast", "Posterize", "Solarize", "AutoContrast", "Equalize")  # a new value for each value
OPS = ("Identity", *GEOMETRIC, "Color", "Sharpness", *TABLES)               # drawn by number, all equally often
BINS = 31  # magnitudes 0 to 30


class Draws(NamedTuple):
    """What the images of a batch get: op numbers (places in OPS) and whether the magnitude is negative, both (B, n)."""
    ops: np.ndarray
    negative: np.ndarray

    def share(self, part: slice) -> "Draws":
        """Those of some images of the batch alone."""
        return Draws(*(numbers[part] for numbers in self))


def draw(rng: np.random.Generator, batch_size: int, num_ops: int = 2) -> Draws:
    """Draws for a whole global batch. Half of the magnitudes are negative; ops without a sign do not look at theirs."""
    shape = batch_size, num_ops
    return Draws(rng.integers(len(OPS), size=shape), rng.random(shape) < 0.5)


@torch.no_grad()
def randaugment(images: Tensor, draws: Draws, magnitude: int = 9) -> Tensor:
    """uint8 (B, C, H, W) and draws for B images -> uint8 (B, C, H, W); magnitude: 0 to 30, the same for all.

    Interpolation is nearest, what comes from outside is 0. Equal to torchvision's on uint8 tensors, but for two cases
    of rounding. Where torchvision rounds once (a fused multiply-add) and this twice, a value may differ by 1 of 255.
    A pixel that comes from half-way between two others (within 1e-4 of a pixel) may be the other one.
    ValueError: another type, neither 1 nor 3 channels (Color and Contrast have a grey image for no other), a magnitude
    out of range, draws for another number of images.
    """
    B, C, H, W = images.shape
    if images.dtype != torch.uint8:
        raise ValueError(f"RandAugment works on pixels of type uint8, before the normalisation, not on {images.dtype}.")
    if C not in (1, 3):
        raise ValueError(f"RandAugment is defined for images of 1 or 3 channels, not of {C}.")
    if not 0 <= magnitude < BINS:
        raise ValueError(f"RandAugment's magnitude is {magnitude}: it is 0 to {BINS - 1}.")
    if len(draws.ops) != B:
        raise ValueError(f"RandAugment was drawn for {len(draws.ops)} images, but the batch has {B}.")
    place, orders, numbers, counts = np.arange(B), [], [], []      # place: which image stands where
    for ops, negative in zip(draws.ops.T, draws.negative.T):
        orders.append(np.argsort(ops[place], kind="stable"))       # images of one op side by side
        place = place[orders[-1]]
        numbers.append(_numbers(H, W, magnitude)[ops[place], negative[place].astype(int)])
        counts.append(np.bincount(ops, minlength=len(OPS)).tolist())
    order = _send(np.array([*orders, np.argsort(place)]), images.device)  # the last one puts them back
    if numbers:
        numbers = _send(np.stack(numbers), images.device)          # (n, B, 6)
    for step, count in enumerate(counts):
        images = _one_op_each(images.index_select(0, order[step]), numbers[step], count)
    return images.index_select(0, order[-1])


def _send(array: np.ndarray, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


@lru_cache
def _numbers(height: int, width: int, magnitude: int) -> np.ndarray:
    """(14, 2, 6) float32: what each op needs to know for a positive and a negative magnitude.

    The geometric ops: a, b, c, d, e, f, by which the pixel at column x and row y comes from (a x + b y + c,
    d x + e y + f). The other ops: one number; the blends: the share of the image and that of what is blended in.
    """
    def at(low: float, high: float) -> float:
        return float(torch.linspace(low, high, BINS)[magnitude])

    table = np.zeros((len(OPS), 2, 6), dtype=np.float32)
    for column, sign in enumerate((1, -1)):
        shear, factor, angle = sign * at(0, 0.3), 1 + sign * at(0, 0.9), math.radians(sign * at(0, 30))
        right, down = (int(sign * at(0, 150 / 331 * side)) for side in (width, height))  # whole pixels
        x, y, cos, sin = (width - 1) / 2, (height - 1) / 2, math.cos(angle), math.sin(angle)
        rows = {"ShearX": (1, shear, shear / 2, 0, 1, 0), "ShearY": (1, 0, 0, shear, 1, shear / 2),
                "TranslateX": (1, 0, -right, 0, 1, 0), "TranslateY": (1, 0, 0, 0, 1, -down),
                "Rotate": (cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y),
                **dict.fromkeys(("Color", "Sharpness", "Brightness", "Contrast"), (factor, 1 - factor)),
                "Posterize": (2 ** round(magnitude / ((BINS - 1) / 4)),), "Solarize": (255 * at(1, 0),)}
        for name, row in rows.items():
            table[OPS.index(name), column, :len(row)] = row
    return table


def _one_op_each(images: Tensor, numbers: Tensor, count: list[int]) -> Tensor:
    """Images (B, C, H, W) in the order of their ops, their numbers (B, 6), and how many have each op."""
    color, mapped = OPS.index("Color"), OPS.index(TABLES[0])
    sizes = [count[0], sum(count[1:color]), *count[color:mapped], sum(count[mapped:])]
    same, moved, coloured, sharpened, others = zip(images.split(sizes), numbers.split(sizes))
    return torch.cat([same[0], _affine(*moved), _color(*coloured), _sharpness(*sharpened),
                      _through_tables(*others, count[mapped:])])


def _affine(images: Tensor, numbers: Tensor) -> Tensor:
    """Each pixel from the nearest one to where it comes from."""
    n, C, H, W = images.shape
    a, b, c, d, e, f = numbers.view(n, 6, 1, 1).unbind(1)
    x = torch.arange(W, device=images.device, dtype=torch.float32)
    y = torch.arange(H, device=images.device, dtype=torch.float32)[:, None]
    column, row = (a * x + (b * y + c)).round(), (d * x + (e * y + f)).round()           # (n, H, W)
    inside = (column >= 0) & (column < W) & (row >= 0) & (row < H)
    source = torch.where(inside, row * W + column, 0).long().view(n, 1, H * W)           # no matmul: TF32 would blur it
    return images.flatten(2).gather(2, source.expand(-1, C, -1)).view_as(images) * inside[:, None]


def _color(images: Tensor, numbers: Tensor) -> Tensor:
    """Blended with their grey image; one channel is grey already."""
    return images if images.shape[1] == 1 else _pixels(_blend(images, _grey(images), numbers))


def _sharpness(images: Tensor, numbers: Tensor) -> Tensor:
    """Blended with the smoothed image: 3 x 3 pixels of weight 1, the middle 5, over 13. The border stays."""
    if min(images.shape[2:]) <= 2:
        return images
    middle = images[:, :, 1:-1, 1:-1]
    total = images.short()
    total = total[:, :, :-2] + total[:, :, 1:-1] + total[:, :, 2:]
    total = total[..., :-2] + total[..., 1:-1] + total[..., 2:] + 4 * middle.short()     # whole: no convolution's TF32
    smoother = (total / 13).round().sub_(middle).mul_(numbers[:, 1].view(-1, 1, 1, 1))
    images = images.clone()
    images[:, :, 1:-1, 1:-1] = _pixels(smoother.add_(middle))
    return images


def _through_tables(images: Tensor, numbers: Tensor, count: list[int]) -> Tensor:
    """The ops in which a pixel's new value follows from its old one, by a table for each image and channel."""
    levels = torch.arange(256, device=images.device, dtype=torch.float32).expand(*images.shape[:2], -1)
    makers = _brightness, _contrast, _posterize, _solarize, _autocontrast, _equalize     # in the order of TABLES
    groups = zip(makers, images.split(count), levels.split(count), numbers[:, :, None, None].split(count))
    tables = torch.cat([make(x, level, number) for make, x, level, number in groups])    # (n, C, 256)
    return _pixels(tables).gather(2, images.flatten(2).long()).view_as(images)


def _brightness(images: Tensor, levels: Tensor, numbers: Tensor) -> Tensor:
    return levels * numbers[:, 0]


def _contrast(images: Tensor, levels: Tensor, numbers: Tensor) -> Tensor:
    """Blended with the mean of the grey image."""
    pixels = images.shape[2] * images.shape[3]
    mean = _grey(images).sum((2, 3), dtype=torch.float64).div(pixels).float()            # (n, 1)
    return _blend(levels, mean[:, :, None], numbers)


def _posterize(images: Tensor, levels: Tensor, numbers: Tensor) -> Tensor:
    """The lowest bits are lost."""
    return levels - levels % numbers[:, 0]


def _solarize(images: Tensor, levels: Tensor, numbers: Tensor) -> Tensor:
    """What is bright, is inverted."""
    return torch.where(levels >= numbers[:, 0], 255 - levels, levels)


def _autocontrast(images: Tensor, levels: Tensor, numbers: Tensor) -> Tensor:
    """The values of a channel are stretched to 0 to 255, unless they are all the same."""
    low, high = images.amin((2, 3)).float()[..., None], images.amax((2, 3)).float()[..., None]
    return torch.where(low == high, levels, (levels - low) / ((high - low).clamp(min=1) * (1 / 255)))


def _equalize(images: Tensor, levels: Tensor, numbers: Tensor) -> Tensor:
    """The values of a channel are spread so that all are about equally frequent, as Pillow counts them."""
    flat = images.flatten(2).long()
    histogram = torch.zeros(levels.shape, dtype=torch.int32, device=images.device)
    histogram.scatter_add_(2, flat, histogram.new_ones(1).expand_as(flat))
    below = histogram.cumsum(2) - histogram                                               # pixels darker than a level
    step = below.masked_fill(histogram == 0, 0).amax(2, keepdim=True) // 255              # without the brightest ones
    return torch.where(step == 0, levels, (below + step // 2) // step.clamp(min=1))


def _grey(images: Tensor) -> Tensor:
    """(n, C, H, W) -> whole numbers as float32 (n, 1, H, W)"""
    if images.shape[1] == 1:
        return images.float()
    red, green, blue = images.split(1, dim=1)
    return (red * 0.2989 + green * 0.587 + blue * 0.114).floor_()


def _blend(images: Tensor, others: Tensor, numbers: Tensor) -> Tensor:
    own, rest = numbers[:, :2].reshape(-1, 2, *(1,) * (images.ndim - 1)).unbind(1)
    return images * own + others * rest


def _pixels(values: Tensor) -> Tensor:
    return values.clamp(0, 255).byte()
