"""The random crop of small images: pad with zeros, cut the size back at a random offset, mirror some.

torchvision's RandomCrop(size, padding) and then RandomHorizontalFlip, for a whole batch with one gather. Offsets are
drawn for the whole global batch, of which a process takes its share: `draw(...)[share]`.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

PADDING = 4  # pixels a side: usual for images of 32 pixels since He et al. 2016, 4.2


def draw(rng: np.random.Generator, batch_size: int, padding: int = PADDING) -> np.ndarray:
    """Offsets of a whole global batch in the padded images: (B, 2) of top, left, each 0 to 2 padding."""
    return rng.integers(2 * padding + 1, size=(batch_size, 2))


@torch.no_grad()
def padded_crop(images: Tensor, offsets: Tensor, flips: Tensor, padding: int = PADDING) -> Tensor:
    """Images (B, C, H, W) of any type, offsets (B, 2) and flips (B,) on their device -> images of the same size.

    0 is black before the normalisation only: pixels on the scale 0 to 255 belong in here.
    """
    B, C, H, W = images.shape
    rows = offsets[:, :1] + torch.arange(H, device=images.device)                     # (B, H) in the padded image
    columns = torch.arange(W, device=images.device)
    columns = offsets[:, 1:] + torch.where(flips[:, None], W - 1 - columns, columns)  # (B, W)
    images = F.pad(images, [padding] * 4).flatten(2)
    places = rows[:, :, None] * (W + 2 * padding) + columns[:, None]                  # (B, H, W)
    return images.gather(2, places.view(B, 1, H * W).expand(-1, C, -1)).view(B, C, H, W)
