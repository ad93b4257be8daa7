"""Views of images: crop, flip and resize of a whole uint8 batch on the device, as two batched matrix products.

A bilinear resize without antialias takes each output row from two input rows: `Taps` says which two and how they are
mixed. Cropping shifts the taps, flipping reverses them, and an image may be cut down to its tapped pixels before it
travels (`gather`) without changing a bit of the result. The numbers are those of `tf.image.resize` and
`tf.image.sample_distorted_bounding_box` as Google's `input_pipeline.py:get_data` calls them.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

ASPECT = (0.75, 1.33)  # width / height, drawn uniformly; TensorFlow's default, not torchvision's log-uniform 3/4 to 4/3


class Taps(NamedTuple):
    """For each of S output positions of B images: the two input positions and the second one's weight, all (B, S)."""
    low: np.ndarray
    high: np.ndarray
    weight: np.ndarray

    def of(self, b: int) -> "Taps":
        """Those of image b alone, (1, S)."""
        return Taps(*(a[b:b + 1] for a in self))


def taps(start: np.ndarray, length: np.ndarray, size: int, flip: np.ndarray | None = None) -> Taps:
    """Taps that resize the stretch [start, start + length) of each image to `size`; `flip` (B,) mirrors some.

    Half-pixel centres, no antialias also when shrinking. float32 throughout: so are TensorFlow's coordinates.
    """
    scale = length.astype(np.float32) / np.float32(size)
    at = (np.arange(size, dtype=np.float32) + np.float32(0.5)) * scale[:, None] - np.float32(0.5)   # (B, S)
    floor = np.floor(at)
    last = length[:, None] - 1
    low = np.clip(floor, 0, last).astype(np.int64) + start[:, None]
    high = np.clip(floor + 1, 0, last).astype(np.int64) + start[:, None]
    weight = at - floor
    if flip is not None:
        low, high, weight = (np.where(flip[:, None], a[:, ::-1], a) for a in (low, high, weight))
    return Taps(low, high, weight)


def random_boxes(rng: np.random.Generator, height: np.ndarray, width: np.ndarray, min_area: float) -> np.ndarray:
    """Google's crop boxes for images of the given sizes (B,): (B, 4) of top, left, height, width in pixels.

    The aspect ratio is uniform, then the *height* is uniform among those that fit, so small boxes are more frequent
    than with torchvision's uniform area; a box that is not full never touches the bottom or right edge. These are
    the habits of `sample_distorted_bounding_box` (area `min_area` to 1, nothing to cover, 100 attempts).
    """
    area = (height * width).astype(np.float64)
    boxes = np.stack([np.zeros_like(height), np.zeros_like(width), height, width], axis=1)  # if all attempts fail
    open_ = np.ones(len(height), dtype=bool)
    for _ in range(100):
        ratio = rng.uniform(*ASPECT, len(height))
        lowest = np.rint(np.sqrt(min_area * area / ratio))
        highest = np.rint(np.sqrt(area / ratio))
        fits = np.floor((width + 0.5 - 1e-7) / ratio)             # the largest height whose rounded width fits
        fits -= np.rint(fits * ratio) > width
        highest = np.minimum(np.where(np.rint(highest * ratio) > width, fits, highest), height)
        lowest = np.minimum(lowest, highest)
        h = lowest + np.floor(rng.random(len(height)) * (highest - lowest + 1))
        h += np.rint(h * ratio) * h < min_area * area              # undo what rounding did to the area
        h -= np.rint(h * ratio) * h > area
        w = np.rint(h * ratio)
        top = np.floor(rng.random(len(height)) * (height - h))     # exclusive: h = height gives 0
        left = np.floor(rng.random(len(height)) * (width - w))
        good = open_ & (h * w >= min_area * area) & (h * w <= area) & (h >= 1) & (w >= 1) & (h <= height) & (w <= width)
        boxes[good] = np.stack([top, left, h, w], axis=1)[good]
        open_ &= ~good
        if not open_.any():
            break
    return boxes


def training_taps(rng: np.random.Generator, sizes: np.ndarray, out: tuple[int, int], min_area: float, flip: bool):
    """(rows, columns) of a training view for images of `sizes` (B, 2): box, resize to `out` (H, W), flip half."""
    boxes = random_boxes(rng, sizes[:, 0], sizes[:, 1], min_area)
    mirrored = rng.random(len(sizes)) > 0.5 if flip else None
    return taps(boxes[:, 0], boxes[:, 2], out[0]), taps(boxes[:, 1], boxes[:, 3], out[1], mirrored)


def evaluation_taps(sizes: np.ndarray, out: tuple[int, int]):
    """(rows, columns) of Google's evaluation view: the whole image squashed to `out` (H, W)."""
    zero = np.zeros(len(sizes), dtype=np.int64)
    return taps(zero, sizes[:, 0], out[0]), taps(zero, sizes[:, 1], out[1])


def gather(image: Tensor, rows: Taps, columns: Taps) -> tuple[Tensor, Taps, Taps]:
    """One image (3, H, W) and its taps (1, S), cut down to the pixels that are looked at: at most 2 S a side."""
    image, rows = _gather_axis(image, rows, 1)
    image, columns = _gather_axis(image, columns, 2)
    return image, rows, columns


def _gather_axis(image: Tensor, taps: Taps, axis: int) -> tuple[Tensor, Taps]:
    first, last = int(taps.low.min()), int(taps.high.max())
    if last - first < 2 * taps.low.shape[1]:                       # a slice is smaller than the list of taps
        return image.narrow(axis, first, last - first + 1), Taps(taps.low - first, taps.high - first, taps.weight)
    used, place = np.unique(np.stack([taps.low, taps.high]), return_inverse=True)
    low, high = place.reshape(2, *taps.low.shape)
    return image.index_select(axis, torch.from_numpy(used)), Taps(low, high, taps.weight)


def stack(images: list[Tensor], rows: list[Taps], columns: list[Taps]) -> tuple[Tensor, Taps, Taps]:
    """Images of different sizes as one batch, padded at the bottom and right where no tap points."""
    height, width = max(i.shape[1] for i in images), max(i.shape[2] for i in images)
    batch = torch.zeros(len(images), 3, height, width, dtype=torch.uint8)
    for target, image in zip(batch, images):
        target[:, :image.shape[1], :image.shape[2]] = image
    return batch, *(Taps(*map(np.concatenate, zip(*axis))) for axis in (rows, columns))


@torch.no_grad()
def view(images: Tensor, rows: Taps, columns: Taps, mean=(0.5,) * 3, std=(0.5,) * 3) -> Tensor:
    """uint8 (B, 3, H, W) and its taps -> float32 (B, 3, S_h, S_w), (x / 255 - mean) / std, on the images' device."""
    B, _, H, W = images.shape
    down, across = _matrix(rows, H, images.device), _matrix(columns, W, images.device)
    with torch.autocast(images.device.type, enabled=False):        # 16 bits would blur the pixels
        x = images.permute(0, 2, 1, 3).reshape(B, H, 3 * W).float()
        x = down @ x                                               # (B, S_h, 3 * W)
        x = x.view(B, -1, W) @ across.mT                           # (B, S_h * 3, S_w)
        x = x.view(B, -1, 3, across.shape[1]).transpose(1, 2)      # (B, 3, S_h, S_w)
        mean = torch.tensor(mean, device=x.device).view(3, 1, 1) * 255
        std = torch.tensor(std, device=x.device).view(3, 1, 1) * 255
        return ((x - mean) / std).contiguous()


def _matrix(taps: Taps, length: int, device) -> Tensor:
    """(B, S, length): the resize along one axis as a matrix with two entries a row."""
    low, high, weight = (torch.as_tensor(a).to(device, non_blocking=True) for a in taps)
    matrix = torch.zeros(*low.shape, length, device=device)
    matrix.scatter_add_(2, low.unsqueeze(2), 1 - weight.unsqueeze(2))
    return matrix.scatter_add_(2, high.unsqueeze(2), weight.unsqueeze(2))
