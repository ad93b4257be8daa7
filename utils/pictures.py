"""Tensors -> pictures that a person looks at: what a model saw, and its attention laid over that."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from models.attention import attention_maps, class_rollout, on_grid, rollout
from models.fill import native_size

HEAT = "inferno"  # from nothing (dark) to much (bright), and readable without colour


def shown(images: Tensor, config) -> np.ndarray:
    """(B, in_chans, H, W), normalised -> (B, H, W, 3) uint8: as the model saw them. One channel is grey; of four and
    more the first three are shown."""
    mean, std = (torch.tensor(values, device=images.device).view(-1, 1, 1) for values in (config.mean, config.std))
    pixels = ((images.float() * std + mean) * 255).round().clamp(0, 255).byte()
    pixels = pixels[:, :3] if pixels.shape[1] >= 3 else pixels[:, :1].expand(-1, 3, -1, -1)
    return pixels.permute(0, 2, 3, 1).cpu().numpy()


def over_pixels(model, maps: Tensor) -> np.ndarray:
    """(B, h, w), a number a patch -> (B, H, W) float32, from 0 for the least of each image to 1 for the largest.

    Bicubic. Pixels that fill no patch, at the right and bottom, have 0, as the model does not see them.
    """
    (H, W), covered = model.img_size, native_size(model.config, model.grid)
    maps = F.interpolate(maps[:, None].float().cpu(), size=covered, mode="bicubic", align_corners=False)
    low, high = maps.amin(dim=(2, 3), keepdim=True), maps.amax(dim=(2, 3), keepdim=True)
    maps = (maps - low) / (high - low).clamp(min=torch.finfo(torch.float32).tiny)
    maps = F.pad(maps, (0, max(W - covered[1], 0), 0, max(H - covered[0], 0)))[:, 0, :H, :W]
    return maps.numpy()


def overlay(image: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 under (H, W) from 0 to 1 -> (H, W, 3) uint8: heat in colour over the image in grey."""
    from matplotlib import colormaps  # slow to import

    grey = image.astype(np.float32) @ np.float32([0.299, 0.587, 0.114])
    colours = colormaps[HEAT](heat)[..., :3] * 255
    return np.clip(0.45 * grey[..., None] + 0.65 * colours, 0, 255).astype(np.uint8)


def shaded(image: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 times (H, W) from 0 to 1, doubled: dark where the model does not look."""
    return np.clip(image * heat[..., None] * 2, 0, 255).astype(np.uint8)


def explained(model, images: Tensor, classes: Tensor) -> list[dict[str, np.ndarray]]:
    """Normalised images and the class of interest of each, (B,) -> of each image what `figure` takes: what the model
    sees, the last layer's attention, rollout, and what speaks for the class."""
    (last,) = attention_maps(model, images, layers=[-1])
    heats = {"last layer, mean of heads": on_grid(model, last.mean(dim=1)), "rollout": rollout(model, images),
             "for this class": class_rollout(model, images, classes)}
    heats = {name: over_pixels(model, heat) for name, heat in heats.items()}
    return [{"what the model sees": image} | {name: overlay(image, heat[n]) for name, heat in heats.items()}
            for n, image in enumerate(shown(images, model.config))]


def figure(pictures: dict[str, np.ndarray], title: str = "", width: float = 2.6):
    """Pictures (H, W, 3), named below, side by side under a title -> a matplotlib `Figure`. width: inches of each."""
    from matplotlib.figure import Figure

    height, across = next(iter(pictures.values())).shape[:2]
    figure = Figure(figsize=(width * len(pictures), width * height / across + 0.5), layout="constrained", dpi=100)
    for axes, (name, picture) in zip(figure.subplots(1, len(pictures), squeeze=False)[0], pictures.items()):
        axes.imshow(picture, interpolation="bicubic" if across < 200 else None)
        axes.set_xlabel(_drawn(name), fontsize=9, parse_math=False)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    figure.suptitle(_drawn(title), fontsize=10, parse_math=False)
    return figure


def _drawn(text: str) -> str:
    """Text that can be drawn: a name of a file may have bytes that are no UTF-8."""
    return text.encode(errors="replace").decode()
