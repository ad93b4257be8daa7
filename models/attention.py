"""What a Vision Transformer looks at: attention maps, rollout, attention distance, of any model of `models.modeling`.

Everything is recorded from outside: hooks see what enters a layer and compute its map from queries and keys once more,
while the network itself goes on through its fused kernel. Without a recording nothing is computed and nothing slower.

Letters as in `modeling`: B images, H heads, T tokens (the class token first, if there is one), (h, w) the grid of
patches, also of hybrids and of images that are not square.
"""

import sys
from collections.abc import Callable, Iterable
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from models.fill import native_size
from models.kernels import linear
from models.modeling import Attention, VisionTransformer


@contextmanager
def recording(model: VisionTransformer, take: Callable[[int, Tensor], None], layers: Iterable[int] | None = None):
    """A context in which each forward pass calls `take(layer, map)` for each layer in turn, or for those of `layers`
    (0 the first, -1 the last).

    map: (B, H, T, T), softmax(q k' / sqrt(d)), float32 at least: row i says how much token i takes from each token. It
    is made when the pass comes to its layer, so that only those exist at a time that `take` keeps. In a training with
    gradient checkpointing the way back passes each layer once more.
    """
    def hook(layer: int):
        return lambda attn, inputs: take(layer, attention_map(attn, inputs[0]))
    known = range(len(model.blocks))
    layers = known if layers is None else sorted({known[i] for i in layers})
    handles = [model.blocks[i].attn.register_forward_pre_hook(hook(i)) for i in layers]
    try:
        with _eager():
            yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def attention_map(attn: Attention, x: Tensor) -> Tensor:
    """(B, T, D), what enters the layer (normalised) -> (B, H, T, T): its attention of all tokens to all."""
    with torch.autocast(x.device.type, enabled=False):
        D = x.shape[-1]
        q, k = attn.heads(linear(x.to(attn.qkv.weight.dtype), attn.qkv.weight[:2 * D], attn.qkv.bias[:2 * D]))
        scores = (q * q.shape[-1] ** -0.5) @ k.mT
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        scores.sub_(scores.amax(dim=-1, keepdim=True)).exp_()                # in place: the largest tensor here
        return scores.div_(scores.sum(dim=-1, keepdim=True))


def attention_maps(model: VisionTransformer, images: Tensor, layers: Iterable[int] | None = None,
                   dtype: torch.dtype | None = None) -> list[Tensor]:
    """(B, in_chans, height, width), normalised -> one (B, H, T, T) a layer, on the CPU.

    layers: only these, as in `recording`. dtype: float16 halves the memory, which is B H T^2 numbers a layer: 192 MB
    in float32 for one image in ViT-B_16 at 384 px.
    """
    maps = []
    _look(model, images, lambda _, attention: maps.append(attention.to("cpu", dtype)), layers)
    return maps


def on_grid(model: VisionTransformer, attention: Tensor) -> Tensor:
    """(..., T, T) -> (..., h, w): what the head's own token takes from each patch.

    With a class token that is its row, without the share that it takes from itself. A `gap` model's head reads the mean
    of all tokens: there it is the mean of their rows.
    """
    return _patches(model, attention[..., 0, :] if model.config.classifier == "token" else attention.mean(dim=-2))


def _patches(model: VisionTransformer, row: Tensor) -> Tensor:
    """(..., T) -> (..., h, w), without the class token."""
    return row[..., int(model.config.classifier == "token"):].unflatten(-1, model.grid)


def rollout(model: VisionTransformer, images: Tensor, heads: str = "mean") -> Tensor:
    """Attention rollout (Abnar and Zuidema 2020, section 3) -> (B, h, w): how much of each patch arrives at the head.

    A single layer's map says where it looks, but from the second layer on tokens are mixtures already. Rollout follows
    the mixing: a layer's matrix is its map, averaged over the heads (or their "max"), plus the identity, since the skip
    connection passes each token on as it is; rows normalised, so that shares stay shares; and the matrices of all
    layers multiplied, last to first. What values, MLPs and norms do is left out, so this is where information could
    have come from, not what it did to the answer: for that see `class_rollout`.
    """
    pool = {"mean": lambda attention: attention.mean(dim=1), "max": lambda attention: attention.amax(dim=1)}[heads]
    product = None

    def multiply(_, attention: Tensor) -> None:
        nonlocal product
        layer = pool(attention)                                              # (B, T, T)
        layer = layer + torch.eye(layer.shape[-1], dtype=layer.dtype, device=layer.device)
        layer /= layer.sum(dim=-1, keepdim=True)
        product = layer if product is None else layer @ product
    _look(model, images, multiply)
    return on_grid(model, product)


def class_rollout(model: VisionTransformer, images: Tensor, classes: Tensor) -> Tensor:
    """Rollout weighted by the gradient of one class's logit an image -> (B, h, w): what speaks for this class.

    classes: (B,) int64. Chefer, Gur and Wolf 2021 (Generic Attention-model Explainability), equations 5 and 6: a
    layer's matrix is the identity plus the mean over the heads of map times gradient where that is positive. The fused
    kernel keeps no maps to differentiate; but where O = A V the gradient of A is that of O times V', and the head's row
    of the product needs one pass over the layers from the last to the first, whose maps are made one at a time. Not
    under `torch.inference_mode`, which has no gradients.
    """
    entered, left = [], []  # of each layer: its input, and the heads' output before the projection
    handles = [handle for block in model.blocks for handle in (
        block.attn.register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0].detach())),
        block.attn.proj.register_forward_pre_hook(lambda _, inputs: left.append(inputs[0])))]
    with _asked(model), torch.enable_grad(), _eager():
        try:
            logits = model(images.detach().clone().requires_grad_())         # so that frozen weights do no harm
        finally:
            for handle in handles:
                handle.remove()
        gradients = torch.autograd.grad(logits.gather(1, classes[:, None]).sum(), left)
    exact = torch.promote_types(entered[0].dtype, torch.float32)
    row = torch.zeros(entered[0].shape[:2], dtype=exact, device=images.device)  # (B, T): the head's row of the product
    if model.config.classifier == "token":
        row[:, 0] = 1
    else:
        row[:] = 1 / row.shape[1]
    for block, x, gradient in reversed(list(zip(model.blocks, entered, gradients))):
        row = row + _weighted(block.attn, x, gradient, row)
    return _patches(model, row)


@torch.no_grad()
def _weighted(attn: Attention, x: Tensor, gradient: Tensor, row: Tensor) -> Tensor:
    """(B, T), the head's row, times a layer's map weighted by its gradient. x: (B, T, D), what entered the layer;
    gradient: (B, queries, D) of the heads' output, of as many tokens as were asked for (no other has a gradient)."""
    D, queries = x.shape[-1], gradient.shape[1]
    (v,) = attn.heads(linear(x, attn.qkv.weight[2 * D:], attn.qkv.bias[2 * D:]))
    (gradient,) = attn.heads(gradient)                                       # (B, H, queries, d)
    weights = (attention_map(attn, x)[:, :, :queries] * (gradient @ v.mT)).clamp(min=0).mean(dim=1)
    return (row[:, None, :queries] @ weights)[:, 0]


def attention_distance(model: VisionTransformer, images: Tensor) -> Tensor:
    """(layers, H): how far each head looks, in pixels of the model's input (Dosovitskiy et al. 2021, figure 11).

    The Euclidean distance of the centres of two patches, weighted by the attention between them, averaged over patches
    that ask and over images. The class token has no place: its row and column are left out, and rows made to sum to 1
    again.
    """
    away, means = patch_distances(model).to(images.device), []

    def measure(_, attention: Tensor) -> None:
        patches = attention[..., -len(away):, -len(away):]
        share = patches / patches.sum(dim=-1, keepdim=True)                  # (B, H, h w, h w)
        means.append((share * away.to(share.dtype)).sum(dim=-1).mean(dim=(0, 2)))
    _look(model, images, measure)
    return torch.stack(means).cpu()


def patch_distances(model: VisionTransformer) -> Tensor:
    """(h w, h w): pixels between the centres of any two patches, row by row."""
    h, w = model.grid
    height, width = native_size(model.config, model.grid)
    places = torch.cartesian_prod(torch.arange(h) * (height / h), torch.arange(w) * (width / w))
    return torch.cdist(places, places)


# --- The pass that is looked at --------------------------------------------------------------------------------------

def _look(model, images: Tensor, take, layers: Iterable[int] | None = None) -> None:
    """One forward pass, as in an evaluation, with its maps given to `take`."""
    with _asked(model), torch.no_grad(), recording(model, take, layers):
        model(images)


def _eager():
    """A context in which compiled blocks, which were traced without hooks, run as written. Its import takes two
    seconds: nothing where nothing can have been compiled."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


@contextmanager
def _asked(model):
    """The model in evaluation mode; afterwards each of its modules in the mode in which it was."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
