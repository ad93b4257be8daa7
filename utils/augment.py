"""Views of images: crop, flip and resize of a whole uint8 batch on the device.

A bilinear resize without antialias takes each output row from two input rows: `Taps` says which two and how they are
mixed. Cropping shifts the taps, flipping reverses them, and a large image may be cut down to its tapped pixels before
it travels (`shrink`) without changing a bit of the result. The numbers are those of `tf.image.resize` and
`tf.image.sample_distorted_bounding_box` as Google's `input_pipeline.py:get_data` calls them.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

ASPECT = (0.75, 1.33)  # width / height, drawn uniformly; TensorFlow's default, not torchvision's log-uniform 3/4 to 4/3
SMALL = 48 * 48  # pixels of a view up to which a CPU, too, is faster with all images at once


class Taps(NamedTuple):
    """For each of S output positions of B images: the two input positions and the second one's weight, all (B, S)."""
    low: Tensor
    high: Tensor
    weight: Tensor

    def of(self, b: int) -> "Taps":
        """Those of image b alone, (1, S)."""
        return Taps(*(t[b:b + 1] for t in self))


def taps(start: Tensor, length: Tensor, size: int, flip: Tensor | None = None) -> Taps:
    """Taps that resize the stretch [start, start + length) of each image to `size`; `flip` (B,) mirrors some.

    Half-pixel centres, no antialias also when shrinking. float32 throughout: so are TensorFlow's coordinates.
    """
    scale = length.float() / size
    last = length[:, None] - 1
    at = (torch.arange(size, device=start.device) + 0.5) * scale[:, None] - 0.5   # (B, S)
    at = torch.minimum(at.clamp(min=0), last)                      # beyond its edge the stretch goes on as it ended
    if flip is not None:
        at = torch.where(flip[:, None], at.flip(1), at)
    low = at.long()
    return Taps(low + start[:, None], torch.minimum(low + 1, last) + start[:, None], at - low)


def box_taps(boxes: Tensor, flips: Tensor, size: tuple[int, int]) -> tuple[Taps, Taps]:
    """(rows, columns) that show boxes (B, 4) of top, left, height, width at `size` (H, W), some mirrored."""
    top, left, height, width = boxes.unbind(1)
    return taps(top, height, size[0]), taps(left, width, size[1], flips)


def random_boxes(draw: Callable[[int], np.ndarray], height: np.ndarray, width: np.ndarray,
                 min_area: float) -> np.ndarray:
    """Google's crop boxes for images of the given sizes (B,): (B, 4) of top, left, height, width in pixels.

    The aspect ratio is uniform, then the *height* is uniform among those that fit, so small boxes are more frequent
    than with torchvision's uniform area; a box that is not full never touches the bottom or right edge. These are
    the habits of `sample_distorted_bounding_box` (area `min_area` to 1, nothing to cover, 100 attempts).
    draw(attempt) gives (4, B) numbers in [0, 1): the box of an image depends on its own column and size alone.
    """
    area = (height * width).astype(np.float64)
    boxes = np.stack([np.zeros_like(height), np.zeros_like(width), height, width], axis=1)  # if all attempts fail
    missing = np.ones(len(height), dtype=bool)
    for attempt in range(100):
        aspect, pick, down, right = draw(attempt)
        ratio = ASPECT[0] + aspect * (ASPECT[1] - ASPECT[0])
        lowest = np.rint(np.sqrt(min_area * area / ratio))
        highest = np.rint(np.sqrt(area / ratio))
        fits = np.floor((width + 0.5 - 1e-7) / ratio)             # the largest height whose rounded width fits
        fits -= np.rint(fits * ratio) > width
        highest = np.minimum(np.where(np.rint(highest * ratio) > width, fits, highest), height)
        lowest = np.minimum(lowest, highest)
        h = lowest + np.floor(pick * (highest - lowest + 1))
        h += np.rint(h * ratio) * h < min_area * area              # undo what rounding did to the area
        h -= np.rint(h * ratio) * h > area
        w = np.rint(h * ratio)
        top, left = np.floor(down * (height - h)), np.floor(right * (width - w))  # exclusive: h = height gives 0
        good = (h * w >= min_area * area) & (h * w <= area) & (h >= 1) & (w >= 1) & (h <= height) & (w <= width)
        boxes[missing & good] = np.stack([top, left, h, w], axis=1)[missing & good]
        missing &= ~good
        if not missing.any():
            break
    return boxes


def whole_boxes(height: np.ndarray, width: np.ndarray) -> np.ndarray:
    """Google's evaluation view: the whole image, squashed to the square."""
    return np.stack([np.zeros_like(height), np.zeros_like(width), height, width], axis=1)


def shrink(image: Tensor, rows: Taps, columns: Taps) -> tuple[Tensor, Taps, Taps]:
    """One image (C, H, W) and its taps (1, S), cut down to the pixels that are looked at: at most 2 S a side."""
    image, rows = _shrink_axis(image, rows, 1)
    image, columns = _shrink_axis(image, columns, 2)
    return image, rows, columns


def _shrink_axis(image: Tensor, taps: Taps, axis: int) -> tuple[Tensor, Taps]:
    first, last = int(taps.low.min()), int(taps.high.max())
    if last - first < 2 * taps.low.shape[1]:                       # a slice is smaller than the list of taps
        return image.narrow(axis, first, last - first + 1), Taps(taps.low - first, taps.high - first, taps.weight)
    used, place = torch.stack([taps.low, taps.high]).unique(return_inverse=True)
    return image.index_select(axis, used), Taps(*place, taps.weight)


def stack(images: list[Tensor], rows: list[Taps], columns: list[Taps]) -> tuple[Tensor, Taps, Taps]:
    """Images of different sizes as one batch, padded at the bottom and right where no tap points."""
    height, width = max(i.shape[1] for i in images), max(i.shape[2] for i in images)
    batch = torch.zeros(len(images), len(images[0]), height, width, dtype=torch.uint8)
    for target, image in zip(batch, images):
        target[:, :image.shape[1], :image.shape[2]] = image
    return batch, *(Taps(*map(torch.cat, zip(*axis))) for axis in (rows, columns))


@torch.no_grad()
def view(images: Tensor | list[Tensor], rows: Taps, columns: Taps, mean: Tensor, std: Tensor) -> Tensor:
    """uint8 (B, C, H, W) and taps on the same device -> float32 (B, C, S_h, S_w), (x - mean) / std per channel.

    images: where they are looked at `singly`, also a list of (C, H, W) of any sizes.
    mean, std: (C, 1, 1) on the scale 0 to 255; (127.5, 127.5) gives Google's [-1, 1].
    """
    device = rows.low.device
    resize = _one_by_one if singly(device, (rows.low.shape[1], columns.low.shape[1])) else _all_at_once
    with torch.autocast(device.type, enabled=False):               # 16 bits would blur the pixels
        return resize(images, rows, columns, mean, std)


def singly(device: torch.device, size: tuple[int, int]) -> bool:
    """Whether views of `size` are made image by image. It follows from device and size alone, so that images give
    the same bits wherever they come from; at most SMALL pixels are too few to earn the calls for each image back."""
    return device.type == "cpu" and size[0] * size[1] > SMALL


def _all_at_once(images: Tensor, rows: Taps, columns: Taps, mean: Tensor, std: Tensor) -> Tensor:
    """`view` as two batched matrix products: a few kernels, but most factors are zero."""
    B, C, H, W = images.shape
    x = images.permute(0, 2, 1, 3).reshape(B, H, C * W).float()
    x = _matrix(rows, H) @ x                                       # (B, S_h, C * W)
    x = x.view(B, -1, W) @ _matrix(columns, W).mT                  # (B, S_h * C, S_w)
    x = x.view(B, -1, C, x.shape[2]).transpose(1, 2).contiguous()  # (B, C, S_h, S_w)
    return x.sub_(mean).div_(std)  # in place: on a CPU, fresh memory for a batch costs more than the arithmetic


def _matrix(taps: Taps, length: int) -> Tensor:
    """(B, S, length): the resize along one axis as a matrix with two entries a row."""
    matrix = torch.zeros(*taps.low.shape, length, device=taps.weight.device)
    matrix.scatter_add_(2, taps.low.unsqueeze(2), 1 - taps.weight.unsqueeze(2))
    return matrix.scatter_add_(2, taps.high.unsqueeze(2), taps.weight.unsqueeze(2))


def _one_by_one(images: Tensor | list[Tensor], rows: Taps, columns: Taps, mean: Tensor, std: Tensor) -> Tensor:
    """`view` with nothing multiplied by zero, image after image, so that the pixels of one stay in a core's cache."""
    size = rows.low.shape[1], columns.low.shape[1]
    views = torch.empty(len(images), len(images[0]), *size)
    for image, target, (height, *down), (width, *across) in zip(images, views, _each(rows), _each(columns)):
        x = image[:, height, width]                                # (C, h, w)
        if x.shape[1] > size[0]:                                   # the rows that are not looked at go first
            x = _down(x, *down).sub_(mean).div_(std)               # (C, S_h, w)
            _across(x, *across, out=target)
        else:                                                      # a small box has the fewest numbers to normalise
            x = x.float().sub_(mean).div_(std)
            _down(_across(x, *across), *down, out=target)
    return views


def _down(x: Tensor, low: Tensor, high: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """(C, h, w) -> float32 (C, S_h, w)"""
    low, high = (x.index_select(1, rows).float() for rows in (low, high))
    return torch.lerp(low, high, weight[:, None], out=low if out is None else out)


def _across(x: Tensor, low: Tensor, high: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """float32 (C, h, w) -> (C, h, S_w)"""
    low, high = (x.gather(2, columns.expand(*x.shape[:2], -1)) for columns in (low, high))
    return torch.lerp(low, high, weight, out=low if out is None else out)


def _each(taps: Taps) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Of each image: the stretch in which its taps lie, and (S,) low and high counted from there, and weight."""
    first, last = taps.low.amin(dim=1, keepdim=True), taps.high.amax(dim=1)
    stretches = (slice(a, b + 1) for a, b in zip(first[:, 0].tolist(), last.tolist()))
    return zip(stretches, taps.low - first, taps.high - first, taps.weight)
