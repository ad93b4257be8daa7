"""What the first layer has learned, and where a model thinks its patches are (Dosovitskiy et al. 2021, figure 7)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.modeling import VisionTransformer


@torch.no_grad()
def patch_filters(model: VisionTransformer, components: int = 28) -> Tensor:
    """The principal components of the filters that see pixels -> (components, in_chans, height, width), largest first.

    These are the patch embedding's, of a hybrid those of its first convolution. The mean filter is taken away first.
    Fewer where the filters have no more; the sign is such that a component's largest value is positive.
    """
    first = next(layer for layer in model.patch_embed.modules() if isinstance(layer, nn.Conv2d))
    filters = first.weight.double().flatten(1)                               # (D, in_chans * height * width)
    directions = torch.linalg.svd(filters - filters.mean(dim=0), full_matrices=False).Vh[:components]
    largest = directions.gather(1, directions.abs().argmax(dim=1, keepdim=True))
    return (directions * largest.sign()).float().unflatten(1, first.weight.shape[1:])


@torch.no_grad()
def position_similarity(model: VisionTransformer) -> Tensor:
    """(h, w, h, w): cosine of the position embeddings of any two patches; the class token's is left out.

    Of a model without position embeddings (all zero) every cosine is 0.
    """
    h, w = model.grid
    places = F.normalize(model.pos_embed[0, -h * w:].double(), dim=-1)
    return (places @ places.T).float().reshape(h, w, h, w)
