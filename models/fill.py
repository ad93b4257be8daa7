"""An open file and a table of names -> a model: every array used once or left out with its reason, nothing guessed.

Position embeddings are resized and the first kernel adapted on the way. The layouts themselves are in `npz.py` and
`exchange.py`.
"""

import logging
import math
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from ml_collections import FrozenConfigDict
from torch import Tensor, nn

from models.configs import replace
from models.modeling import VisionTransformer, grid_size

log = logging.getLogger(__name__)


class Layout(NamedTuple):
    """How an array lies in the file and in the parameter; both ways are views, nothing is copied."""
    ours: Callable    # Google's array -> our array
    google: Callable  # our array, number of heads -> Google's array
    flat: bool = False  # its last axis alone is accepted too


SAME = Layout(lambda a: a, lambda a, H: a)


class Row(NamedTuple):
    key: str             # in the file
    parameter: str       # in our model
    layout: Layout = SAME
    third: int | None = None  # which third of the fused qkv: 0 query, 1 key, 2 value


class Scratch(threading.local):
    """Memory into which each thread reads one array after the other."""
    buffer = np.empty(0, np.uint8)

    def take(self, size: int) -> np.ndarray:
        """`size` bytes; what this thread took before is no longer valid."""
        if not size <= len(self.buffer) <= 2 * max(size, 2**20):  # what a large array took would stay taken
            self.buffer = np.empty(size, np.uint8)
        return self.buffer[:size]


def classes_of(shapes: dict, bias: str) -> int:
    """Classes of the head with this bias; 0 where there is none."""
    return (shapes.get(bias) or (0,))[0]


def fill_model(source, config: FrozenConfigDict, grid: tuple[int, int], rows_of: Callable, *, head: tuple[str, str],
               pre_logits: tuple[str, str], img_size, num_classes: int | None, in_chans: int | None = None,
               dtype: torch.dtype = torch.float32) -> VisionTransformer:
    """A model whose every parameter is filled once from an open file; what is left out is said with its reason.

    source: has `path`, `shapes` (in the file's order), `read(key)`, whose array stays valid until the same thread reads
    again, and `threads`, how many may read; rows_of(model): the table; head, pre_logits: their keys in the file;
    config: the file's, which in_chans may change.
    """
    classes, skipped = classes_of(source.shapes, head[1]), {"grid": "it tells the shape of the position embedding"}
    model_config = with_channels(config, in_chans or config.in_chans)
    if num_classes is not None:
        classes, model_config = num_classes, replace(model_config, representation_size=None)
        skipped |= dict.fromkeys(head, f"a new head of {num_classes} classes takes its place" if num_classes else
                                 "no head was asked for")
        skipped |= dict.fromkeys(pre_logits, "fine-tuning drops it, as Google does")
    with torch.device("meta"):  # no memory and no initial values for what the file fills anyway
        model = VisionTransformer(model_config, img_size or native_size(config, grid), classes)
    rows = [row for row in rows_of(model) if not (num_classes and row.parameter.startswith("head."))]
    _check_keys(source, rows, skipped)
    _check_shapes(source, rows, model, config, grid)
    for module in model.modules():  # `to_empty` would do the same, and load sympy for it (0.4 s)
        for name, parameter in module.named_parameters(recurse=False):
            empty = torch.empty(parameter.shape, dtype=dtype)
            setattr(module, name, nn.Parameter(empty, requires_grad=parameter.requires_grad))
    if num_classes:
        nn.init.zeros_(model.head.weight)
        nn.init.zeros_(model.head.bias)
    parameters = dict(model.named_parameters())
    filled = [row.parameter for row in rows if not row.third]  # of query, key and value the first stands for all
    assert sorted(filled) == sorted(name for name in parameters if num_classes is None or name[:5] != "head.")
    # The largest first, while little of the model's memory is in use: what it takes to read them is then no peak. In
    # threads, as checksums, first touches of memory and transposed copies are the work of one core each.
    place = {key: (-math.prod(shape), i) for i, (key, shape) in enumerate(source.shapes.items())}
    with ThreadPoolExecutor(min(os.cpu_count() or 1, source.threads)) as pool:
        list(pool.map(lambda row: _fill(parameters[row.parameter], row, source, grid, model.grid),
                      sorted(rows, key=lambda row: place[row.key])))
    for key in skipped:
        if key in source.shapes and key != "grid":
            log.info("%s: '%s' not loaded: %s.", source.path.name, key, skipped[key])
    if num_classes is None and model.num_classes and not model.head.weight.any() and not model.head.bias.any():
        log.warning("%s: its head is all zero, so every logit is zero (Google zeroed the heads of imagenet21k). Give "
                    "num_classes for a head to train.", source.path.name)
    return model


def _check_keys(source, rows: list[Row], skipped: dict[str, str]) -> None:
    wanted = {row.key for row in rows}
    missing = sorted(wanted - set(source.shapes))
    extra = sorted(set(source.shapes) - wanted - set(skipped))
    if missing or extra:
        said = [f"{what} {', '.join(map(repr, keys[:4]))}" + (f" and {len(keys) - 4} more" if keys[4:] else "")
                for what, keys in (("missing", missing), ("unknown", extra)) if keys]
        raise ValueError(f"{source.path} does not fit its own architecture: {'; '.join(said)}.")


def _check_shapes(source, rows: list[Row], model: VisionTransformer, config, grid) -> None:
    """Every array has the shape that the file's own configuration and grid ask for; before memory is taken."""
    parameters = dict(model.named_parameters())
    tokens = (config.classifier == "token") + grid[0] * grid[1]
    for row in rows:
        ours = list(parameters[row.parameter].shape)
        if row.third is not None:
            ours[0] //= 3
        if row.parameter == "pos_embed":
            ours[1] = tokens
        elif row.parameter == root_kernel(config):
            ours[1] = config.in_chans
        shape, expected = source.shapes[row.key], google_shape(ours, row, config)
        if shape != expected and not (row.layout.flat and shape == expected[-1:]):
            raise ValueError(f"{source.path}: '{row.key}' has shape {shape}, expected {expected}.")


@torch.no_grad()
def _fill(parameter: Tensor, row: Row, source, grid, new_grid) -> None:
    """Copies one array of the file into its parameter, or into its third of the fused qkv."""
    target = parameter if row.third is None else parameter.chunk(3)[row.third]
    array = source.read(row.key)
    if not np.isfinite(array).all():
        raise ValueError(f"{source.path}: '{row.key}' holds values that are not finite numbers. Fetch it again.")
    values = torch.from_numpy(row.layout.ours(array))  # a view, still in the file's order
    if row.parameter == "pos_embed" and grid != new_grid:
        values = resize_pos_embed(values, grid, new_grid)
    elif values.shape != target.shape:
        values = adapt_channels(values.double(), target.shape[1])
    target.copy_(values)


def google_shape(shape, row: Row, config) -> tuple[int, ...]:
    return row.layout.google(np.broadcast_to(np.float32(0), tuple(shape)), config.num_heads).shape


# --- Channels --------------------------------------------------------------------------------------------------------

def with_channels(config: FrozenConfigDict, channels: int) -> FrozenConfigDict:
    """The configuration for images of so many channels: mean and deviation are repeated, or averaged for one."""
    if channels == config.in_chans:
        return config
    spread = {field: (sum(config[field]) / len(config[field]),) if channels == 1 else
              tuple(config[field][c % config.in_chans] for c in range(channels)) for field in ("mean", "std")}
    return replace(config, in_chans=channels, **spread)


def root_kernel(config: FrozenConfigDict) -> str:
    """The parameter that sees the image's channels."""
    if config.resnet is None:
        return "patch_embed.proj.weight"
    return f"patch_embed.backbone{'.stem' if config.resnet.num_layers else ''}.conv.weight"


def adapt_channels(kernel: Tensor, channels: int) -> Tensor:
    """(D, C, h, w) -> (D, channels, h, w): summed for one channel, else repeated in turn and scaled by C / channels.

    Summed, a grey image gives what its copy in C equal channels gave (where a hybrid's kernel is standardised: up to
    a factor for each of its channels); repeated, the sum over the channels, and so the scale, is kept.
    """
    log.info("The first kernel is adapted from %d to %d channels: %s.", kernel.shape[1], channels,
             "summed" if channels == 1 else "repeated in turn")
    if channels == 1:
        return kernel.sum(dim=1, keepdim=True)
    return kernel[:, [c % kernel.shape[1] for c in range(channels)]] * (kernel.shape[1] / channels)


# --- Position embedding ----------------------------------------------------------------------------------------------

def is_square(n: int) -> bool:
    return n > 0 and math.isqrt(n) ** 2 == n


def square_or_told(path, positions: int, config: FrozenConfigDict, img_size) -> tuple[int, int]:
    """The grid of a file that does not record it. ValueError: not square, and not that of img_size (H, W) either."""
    if is_square(positions):
        return math.isqrt(positions), math.isqrt(positions)
    size = (img_size, img_size) if isinstance(img_size, int) else img_size
    told = grid_size(config, size) if size else (0, 0)
    if positions < 1 or told[0] * told[1] != positions:
        raise ValueError(f"{path}: {positions} positions are no square grid, and the file does not say its shape. Load "
                         "it at its own size (--img_size H,W, in Python img_size=(H, W)), or add to an .npz an array "
                         "'grid' of two numbers (rows, columns).")
    return told


def native_size(config: FrozenConfigDict, grid: tuple[int, int]) -> tuple[int, int]:
    """Pixels (H, W) of the smallest image without remainder that fills `grid`."""
    scale = 1 if config.resnet is None else 2 ** (2 + max(len(config.resnet.num_layers) - 1, 0))
    return grid[0] * config.patch_size[0] * scale, grid[1] * config.patch_size[1] * scale


def resize_pos_embed(pos_embed: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """(1, [1 +] old rows * columns, D) -> (1, [1 +] new rows * columns, D), float64: bilinear with aligned corners.

    Equals Google's `scipy.ndimage.zoom(order=1)` (`interpolate_posembed`), except where a rounding of scipy's makes
    the last row or column of theirs zero: ours interpolates there as everywhere, and says so. A class row is kept.
    An embedding by formula is resized in the same way, and not computed anew: the blocks know its values.
    """
    class_row, grid = pos_embed.split((pos_embed.shape[1] - old[0] * old[1], old[0] * old[1]), dim=1)
    grid = grid.double().reshape(1, *old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=new, mode="bilinear", align_corners=True)
    log.info("Position embedding resized from %d x %d to %d x %d.", *old, *new)
    if any(google_zeroes_edge(o, n) for o, n in zip(old, new)):
        log.info("Google's own resize leaves the last row or column of this grid at zero; ours interpolates it.")
    return torch.cat([class_row.double(), grid.flatten(2).mT], dim=1)


def google_zeroes_edge(old: int, new: int) -> bool:
    """Whether scipy takes the last of `new` samples for one outside the `old` ones (it then writes zeros)."""
    return old != new and new > 1 and (new - 1) * ((old - 1) / (new - 1)) > old - 1
