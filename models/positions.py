"""Fixed position embeddings, by formula: computed in float64 on the CPU, rounded to float32 at the end."""

import torch
from ml_collections import FrozenConfigDict
from torch import Tensor

TEMPERATURE = 10000.0  # the longest wave is about so many times 2 pi tokens long


def by_formula(config: FrozenConfigDict, grid: tuple[int, int]) -> Tensor:
    """(1, [1 +] rows * columns, D) for a configuration whose `pos_embed` is not learned.

    The class token is position 0 of the line; it has no place on the grid, so there its row is zero.
    ValueError: the width does not divide.
    """
    width, class_token = config.hidden_size, config.classifier == "token"
    tokens = class_token + grid[0] * grid[1]
    if config.pos_embed == "sincos1d":
        return sincos1d(tokens, width)[None]
    table = torch.zeros(1, tokens, width, device="cpu")
    if config.pos_embed == "sincos2d":
        table[0, class_token:] = sincos2d(grid, width)
    return table


def sincos1d(tokens: int, width: int) -> Tensor:
    """(tokens, D) float32: sines at even, cosines at odd dimensions of the token's number (Vaswani et al. 2017, section
    3.5). ValueError: D is odd."""
    if width % 2:
        raise ValueError(f"sincos1d is for an even width, and this one is {width}.")
    exponents = torch.arange(0, width, 2, dtype=torch.float64, device="cpu") / width
    angles = _angles(torch.arange(tokens, device="cpu"), exponents)
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1).float()


def sincos2d(grid: tuple[int, int], width: int) -> Tensor:
    """(rows * columns, D) float32, row by row: a quarter each of sin(x), cos(x), sin(y), cos(y), x the column and y the
    row, as `posemb_sincos_2d` in Google's big_vision (`models/vit.py`) has them.

    Their exponents are i / (D / 4 - 1); in MoCo v3 and MAE, whose form this is, they are i / (D / 4).
    ValueError: D is no multiple of 4, or 4 itself (an exponent of 0 / 0).
    """
    if width % 4 or width < 8:
        raise ValueError(f"sincos2d is for a width that is a multiple of 4, 8 at least, and this one is {width}.")
    exponents = torch.arange(width // 4, dtype=torch.float64, device="cpu") / (width // 4 - 1)
    y, x = (_angles(place.flatten(), exponents) for place in
            torch.meshgrid(*(torch.arange(n, device="cpu") for n in grid), indexing="ij"))
    return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=1).float()


def _angles(places: Tensor, exponents: Tensor) -> Tensor:
    """(N,), (K,) -> (N, K) float64."""
    return places[:, None] * TEMPERATURE ** -exponents
