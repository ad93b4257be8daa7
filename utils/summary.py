"""A model, layer by layer: what comes out of each, how many parameters it has and what it costs. For `--summary`.

The layers, their order and their shapes are torchinfo's; the operations are those that PyTorch's counter sees, as
torchinfo itself counts a linear layer once instead of for each token, and the products inside attention not at all.
"""

import copy
from collections.abc import Callable, Iterator
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchinfo import summary

from models import lora
from models.modeling import Attention, VisionTransformer
from utils.resources import amount


class Layer(NamedTuple):
    """A row of the table, and those inside it."""
    name: str
    kind: str
    shape: str       # of the output; empty: the layer was not called as such
    parameters: int
    training: int    # of the parameters
    flops: int
    inside: tuple["Layer", ...] = ()


def describe(model: VisionTransformer) -> str:
    """The table of layers for one image of the model's size, in evaluation, and what it adds up to.

    FLOPs are those of matrix products and convolutions, 2 for each multiply-add. Nothing is computed: a copy without
    memory takes the place of the model, which stays as it is and may itself be one (`torch.device("meta")`).
    """
    outline = _without_memory(model)
    image = torch.empty(1, model.config.in_chans, *model.img_size, device="meta", dtype=model.pos_embed.dtype)
    with FlopCounterMode(display=False) as counter:
        found = summary(outline, input_data=image, device="meta", verbose=0)
    prefix = type(outline).__name__
    counts = {name.removeprefix(prefix).removeprefix("."): sum(of.values()) for name, of in
              counter.get_flop_counts().items()}
    names = {id(module): name for name, module in outline.named_modules()}
    whole = _layer(found.summary_list[0], lambda module: counts.get(names[id(module)], 0))
    height, width = model.img_size
    head = (f"{model.config.name}: one image of {height} x {width} pixels in {model.config.in_chans} channels, "
            f"{model.grid[0]} x {model.grid[1]} patches")
    return "\n".join([head, "", *_table(whole), "", *_notes(model, outline, whole, image)])


def _without_memory(model: VisionTransformer) -> VisionTransformer:
    """A copy for evaluation whose tensors have shapes and no values; torchinfo keeps what it saw, so it sees this."""
    tensors = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in model.parameters()}
    tensors |= {id(b): b.to("meta") for b in model.buffers()}
    outline = copy.deepcopy(model, tensors).eval()
    for layer in outline.modules():
        if isinstance(layer, lora.LowRank):  # its own sum asks for autocast, which knows no such device
            layer.sum = lambda W, A, B: W + (B @ A).flatten(0, 1)
    return outline


# --- Layers ----------------------------------------------------------------------------------------------------------

def _layer(info, flops: Callable[[nn.Module], int]) -> Layer:
    """torchinfo's row and those below it. flops: of a module."""
    module, inside = info.module, [_layer(child, flops) for child in info.children if child.depth == info.depth + 1]
    size = sum(p.numel() for p in module.parameters())
    training = sum(p.numel() for p in module.parameters() if p.requires_grad)
    if isinstance(module, VisionTransformer):
        at = next(i for i, child in enumerate(inside) if child.name == "pos_drop")
        inside[at:at] = _joined(module)
    elif isinstance(module, Attention):
        batch, queries, width = info.output_size
        heads = [batch, module.num_heads, queries, width // module.num_heads]
        products = "softmax(q k') v"
        if all(child.name != "qkv" for child in inside):  # called for some rows of its weight
            products = f"qkv, {products}"
        inside.insert(-1, Layer(products, "", str(heads), size - sum(child.parameters for child in inside),
                                training - sum(child.training for child in inside),
                                flops(module) - sum(child.flops for child in inside)))
    return Layer(info.var_name, info.class_name, str(info.output_size or ""), size, training,
                 flops(module) or sum(child.flops for child in inside), tuple(inside))


def _joined(model: VisionTransformer) -> Iterator[Layer]:
    """Parameters that are no layer's: the shapes are those behind the joining."""
    shape = str(list(model.pos_embed.shape))
    steps = {"cls_token": "put before the patches", "pos_embed": "added"}
    for name, what in steps.items():
        if (p := getattr(model, name, None)) is not None:
            yield Layer(name, what, shape, p.numel(), p.numel() * p.requires_grad, 0)


def _folded(layers: tuple[Layer, ...]) -> Iterator[Layer]:
    """Of numbered layers in a row that are equal but for the number the first one whole, the others as one row."""
    for _, group in groupby(layers, lambda layer: layer._replace(name="") if layer.name.isdigit() else layer.name):
        first, *others = group
        yield first
        if first.name.isdigit() and others:
            numbers = " to ".join(dict.fromkeys([others[0].name, others[-1].name]))
            yield others[0]._replace(name=numbers, kind=f"{'each ' * (len(others) > 1)}like {first.name}", inside=())
        else:
            yield from others


# --- Text ------------------------------------------------------------------------------------------------------------

def _table(whole: Layer) -> list[str]:
    """The rows, with a column for what trains where not everything does."""
    rows = list(_rows(whole))
    partly = whole.training < whole.parameters
    head = ["layer", "output", "parameters", *["of these train"] * partly, "MFLOP"]
    cells = [head, *([label, layer.shape or "-", _number(layer.parameters),
                      *[_number(layer.training)] * partly, f"{layer.flops / 1e6:,.3f}" if layer.flops else "-"]
                     for label, layer in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ["  ".join([f"{name:{widths[0]}}", f"{shape:{widths[1]}}",
                        *(f"{number:>{width}}" for number, width in zip(numbers, widths[2:]))])
             for name, shape, *numbers in cells]
    rule = "=" * len(lines[0])
    return [lines[0], rule, *lines[1:], rule]


def _rows(layer: Layer, before: str = "", below: str = "") -> Iterator[tuple[str, Layer]]:
    """(label, layer) from top to bottom. before, below: what stands left of the label, and of those inside."""
    named = layer.kind and layer.kind != layer.name  # the model's name is its class
    yield f"{before}{layer.name}{f' ({layer.kind})' if named else ''}", layer
    inside = list(_folded(layer.inside))
    for child in inside:
        last = child is inside[-1]
        yield from _rows(child, below + ("└─ " if last else "├─ "), below + ("   " if last else "│  "))


def _number(count: int) -> str:
    return f"{count:,}" if count else "-"


def _notes(model: VisionTransformer, outline: VisionTransformer, whole: Layer, image: Tensor) -> Iterator[str]:
    """What the table adds up to, and what in it needs a word."""
    types = {str(p.dtype).removeprefix("torch.") for p in model.parameters()}
    size = amount(sum(p.numel() * p.element_size() for p in model.parameters()))
    training = "all of them train" if whole.training == whole.parameters else f"{whole.training:,} of them train"
    yield f"parameters  {whole.parameters:,}; {training}; {size} of {' and '.join(sorted(types))}"
    yield (f"operations  {_giga(whole.flops)}FLOP = {_giga(whole.flops / 2)} multiply-adds, which many papers call "
           "FLOPs: matrix products and")
    yield "            convolutions, nearly all that is computed. To train all of it costs about three times as much."
    if model.config.classifier == "token":
        saved = _flops(outline.forward_features, image) - _flops(outline.forward_features, image, 1)
        yield "last block  The head reads the class token alone, so this block computes that one row, from k and v of"
        yield (f"            all tokens: [1, 1, {model.config.hidden_size}]. The logits are the same, and "
               f"{_giga(saved)}FLOP are saved.")
    if lora.parameters(model):
        yield "LoRA        The sums W + B A are counted; they are made once for a whole batch."


@torch.no_grad()
def _flops(function: Callable, *inputs) -> int:
    with FlopCounterMode(display=False) as counter:
        function(*inputs)
    return counter.get_total_flops()


def _giga(count: float) -> str:
    """35126937600 -> '35.13 G', to stand before FLOP."""
    return f"{count / 1e9:,.2f} G" if count >= 1e8 else f"{count / 1e6:,.2f} M"
