"""Google's `.npz` layout <-> our parameters: one table of names, strict in both directions.

An array of the file fills exactly one parameter (or a third of the fused qkv), or is left out for a reason that is
said. Reading goes array by array straight into the parameters. Layout: `vit_jax/checkpoint.py`, `models_vit.py`; what
differs in other files is repaired in `models/archive.py`.
"""

import logging
import math
import os
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from ml_collections import FrozenConfigDict

from models import published
from models.archive import POS_EMBEDDING, Archive
from models.configs import CONFIGS, get_config, replace
from models.fill import (
    SAME,
    Layout,
    Row,
    classes_of,
    fill_model,
    google_shape,
    is_square,
    native_size,
    square_or_told,
    with_channels,
)
from models.fill import resize_pos_embed as resize_pos_embed  # asked of Google's layout, needed by all
from models.modeling import VisionTransformer

log = logging.getLogger(__name__)


# --- The table -------------------------------------------------------------------------------------------------------

DENSE = Layout(lambda a: a.T, lambda a, H: a.T)                                           # (in, out)
CONV = Layout(lambda a: a.transpose(3, 2, 0, 1), lambda a, H: a.transpose(2, 3, 1, 0))    # (h, w, in, out)
NORM4 = Layout(lambda a: a.reshape(-1), lambda a, H: a.reshape(1, 1, 1, -1), flat=True)   # (1, 1, 1, C) or (C,)
HEADS_IN = Layout(lambda a: a.reshape(a.shape[0], -1).T, lambda a, H: a.T.reshape(a.shape[1], H, -1))   # (D, H, d)
HEADS_BIAS = Layout(lambda a: a.reshape(-1), lambda a, H: a.reshape(H, -1))               # (H, d)
HEADS_OUT = Layout(lambda a: a.reshape(-1, a.shape[-1]).T, lambda a, H: a.T.reshape(H, -1, a.shape[0]))  # (H, d, D)


def table(model: VisionTransformer) -> list[Row]:
    """Every array that a file of this model has, and the parameter that it fills."""
    config, rows = model.config, []
    if config.resnet is not None:
        rows += _stem_rows(config.resnet.num_layers)
    rows += _pair("embedding", "patch_embed.proj", CONV)
    if config.classifier == "token":
        rows += [Row("cls", "cls_token")]
    rows += [Row(POS_EMBEDDING, "pos_embed")]
    for i in range(config.num_layers):
        theirs, ours = f"Transformer/encoderblock_{i}", f"blocks.{i}"
        attention = f"{theirs}/MultiHeadDotProductAttention_1"
        rows += _norm(f"{theirs}/LayerNorm_0", f"{ours}.norm1")
        for third, name in enumerate(("query", "key", "value")):
            rows += [Row(f"{attention}/{name}/kernel", f"{ours}.attn.qkv.weight", HEADS_IN, third),
                     Row(f"{attention}/{name}/bias", f"{ours}.attn.qkv.bias", HEADS_BIAS, third)]
        rows += _pair(f"{attention}/out", f"{ours}.attn.proj", HEADS_OUT)
        rows += _norm(f"{theirs}/LayerNorm_2", f"{ours}.norm2")
        rows += _pair(f"{theirs}/MlpBlock_3/Dense_0", f"{ours}.mlp.fc1", DENSE)
        rows += _pair(f"{theirs}/MlpBlock_3/Dense_1", f"{ours}.mlp.fc2", DENSE)
    rows += _norm("Transformer/encoder_norm", "norm")
    if config.representation_size:
        rows += _pair("pre_logits", "pre_logits.fc", DENSE)
    if model.num_classes:
        rows += _pair("head", "head", DENSE)
    return rows


def _stem_rows(num_layers) -> list[Row]:
    ours = "patch_embed.backbone.stem" if num_layers else "patch_embed.backbone"
    rows = [Row("conv_root/kernel", f"{ours}.conv.weight", CONV), *_norm("gn_root", f"{ours}.norm", NORM4)]
    for i, units in enumerate(num_layers):
        for j in range(units):
            theirs, ours = f"block{i + 1}/unit{j + 1}", f"patch_embed.backbone.stages.{i}.blocks.{j}"
            for n in (1, 2, 3):
                rows += [Row(f"{theirs}/conv{n}/kernel", f"{ours}.conv{n}.weight", CONV)]
                rows += _norm(f"{theirs}/gn{n}", f"{ours}.norm{n}", NORM4)
            if j == 0:
                rows += [Row(f"{theirs}/conv_proj/kernel", f"{ours}.downsample.conv.weight", CONV)]
                rows += _norm(f"{theirs}/gn_proj", f"{ours}.downsample.norm", NORM4)
    return rows


def _pair(theirs, ours, layout):
    return [Row(f"{theirs}/kernel", f"{ours}.weight", layout), Row(f"{theirs}/bias", f"{ours}.bias")]


def _norm(theirs, ours, layout=SAME):
    return [Row(f"{theirs}/scale", f"{ours}.weight", layout), Row(f"{theirs}/bias", f"{ours}.bias", layout)]


# --- What a file is -------------------------------------------------------------------------------------------------

class Identity(NamedTuple):
    """What a file of weights is, as far as names and shapes tell."""
    path: Path
    layout: str                        # "Google's .npz", "ours", "timm", "transformers", "ViT-pytorch"
    repairs: tuple[str, ...]           # in what it differs from that layout
    config: FrozenConfigDict
    grid: tuple[int, int] | None       # of its position embedding; None: not square, and the file does not say
    img_size: tuple[int, int] | None   # (H, W) pixels that belong to the grid
    num_classes: int                   # 0: no head
    dtype: str                         # of the arrays: float32, float16, bfloat16, ..., or mixed
    parameters: int
    size: int                          # bytes
    family: str | None                 # the folder of Google's bucket that it is from; None: nothing proves one
    candidates: tuple[str, ...]        # those that have files like it
    assumed: tuple[str, ...] = ()      # fields of the configuration that nobody recorded: taken to be Google's


def identify(path) -> Identity:
    """What one of Google's files is, from its headers alone: milliseconds, no tensor is read.

    ValueError: not an `.npz`, or another model's. FileNotFoundError: no such file.
    """
    with Archive(path) as archive:
        config = config_of(archive)
        positions = archive.shapes[POS_EMBEDDING][1] - (config.classifier == "token")
        grid = grid_of(archive, config) if "grid" in archive.shapes or is_square(positions) else None
        size = native_size(config, grid) if grid else None
        classes = classes_of(archive.shapes, "head/bias")
        arrays = {key: shape for key, shape in archive.shapes.items() if key != "grid"}
        dtypes = {"bfloat16" if archive.dtypes[key].kind == "V" else archive.dtypes[key].name for key in arrays}
        family, candidates = published.families(
            archive.path, model=config.name, img_size=size, classes=classes, repairs=archive.repairs,
            pre_logits=config.representation_size is not None)
        return Identity(archive.path, "Google's .npz", archive.repairs, config, grid, size, classes,
                        dtypes.pop() if len(dtypes) == 1 else "mixed", sum(map(math.prod, arrays.values())),
                        archive.path.stat().st_size, family, candidates)


def config_of(archive: Archive) -> FrozenConfigDict:
    """The configuration that the shapes tell; a published one where its structure is the same."""
    shapes, block = archive.shapes, "Transformer/encoderblock_0"
    query, dense = f"{block}/MultiHeadDotProductAttention_1/query/kernel", f"{block}/MlpBlock_3/Dense_0/kernel"
    decisive = ("embedding/kernel", query, dense, POS_EMBEDDING, "pre_logits/bias", "conv_root/kernel")
    try:
        channels, width = shapes["embedding/kernel"][2:]
        found = {"patch_size": shapes["embedding/kernel"][:2], "hidden_size": width, "mlp_dim": shapes[dense][1],
                 "num_heads": shapes[query][1], "resnet": None, "classifier": "token" if "cls" in shapes else "gap",
                 "num_layers": len({key.split("/")[1] for key in shapes if "/encoderblock_" in key})}
        if "conv_root/kernel" in shapes:
            channels, root = shapes["conv_root/kernel"][2:]
            units = {tuple(key.split("/")[:2]) for key in shapes if re.match(r"block\d+/unit\d+/", key)}
            stages = Counter(stage for stage, _ in units)
            found["resnet"] = {"num_layers": tuple(stages[name] for name in sorted(stages)), "width_factor": root / 64}
        representation = shapes["pre_logits/bias"][0] if "pre_logits/bias" in shapes else None
        sizes = (width, channels, representation, shapes[POS_EMBEDDING][2], found["mlp_dim"], *found["patch_size"])
        if 0 in sizes or width % found["num_heads"]:
            raise ValueError
    except KeyError as error:
        raise ValueError(f"{archive.path} is no Vision Transformer of Google's: expected an array {error}, found "
                         f"{', '.join(list(shapes)[:3]) or 'nothing'} ...") from error
    except (ValueError, IndexError, ZeroDivisionError) as error:
        seen = ", ".join(f"{key.removeprefix('Transformer/')} {shapes[key]}" for key in decisive if key in shapes)
        raise ValueError(f"{archive.path} is no Vision Transformer of Google's: none has the shapes {seen}.") from error
    return with_channels(replace(named(found), representation_size=representation), channels)


def structure(config) -> dict:
    """What names and shapes of a file determine, by field."""
    fields = ("patch_size", "hidden_size", "mlp_dim", "num_heads", "num_layers", "classifier")
    resnet = config["resnet"] and (tuple(config["resnet"]["num_layers"]), float(config["resnet"]["width_factor"]))
    return {**{field: config[field] for field in fields}, "resnet": resnet}


def named(found: dict) -> FrozenConfigDict:
    """The published configuration with the structure `found`; where there is none, one named "custom"."""
    same = next((config for config in CONFIGS.values() if structure(config) == structure(found)), None)
    return same or replace(CONFIGS["ViT-B_16"], name="custom", dropout_rate=0.0, **found)


def check_config(config, asked: FrozenConfigDict | str, path) -> FrozenConfigDict:
    """The file decides the structure; what was asked for must agree and may bring its own rates of dropout and
    stochastic depth, and its way to project patches."""
    asked = get_config(asked) if isinstance(asked, str) else asked
    have, want = structure(config), structure(asked)
    if have != want:
        differs = ", ".join(f"{name} {have[name]} instead of {want[name]}" for name in have if have[name] != want[name])
        name = f"a {config.name}" if config.name in CONFIGS else "another model"
        raise ValueError(f"{path} holds {name}, not {asked.name}: {differs}.")
    own = ("dropout_rate", "attention_dropout_rate", "drop_path_rate", "patch_proj")
    return replace(config, **{field: asked[field] for field in own})


def grid_of(source, config: FrozenConfigDict, img_size: int | tuple[int, int] | None = None) -> tuple[int, int]:
    """Rows and columns of the file's position embedding: told by our array `grid`, else square, else `img_size`'s."""
    positions = source.shapes[POS_EMBEDDING][1] - (config.classifier == "token")
    if "grid" in source.shapes:
        grid = tuple(int(n) for n in source.read("grid").flat)
        if len(grid) != 2 or min(grid) < 1 or grid[0] * grid[1] != positions:
            raise ValueError(f"{source.path}: its array 'grid' says {grid}, and there are {positions} positions.")
        return grid
    return square_or_told(source.path, positions, config, img_size)


# --- Load ------------------------------------------------------------------------------------------------------------

def load_npz(path, *, img_size: int | tuple[int, int] | None = None, num_classes: int | None = None,
             config: FrozenConfigDict | str | None = None, in_chans: int | None = None,
             dtype: torch.dtype = torch.float32) -> VisionTransformer:
    """A model with the weights of one of Google's files, as `vit_jax/checkpoint.py:load_pretrained` starts from them.

    img_size: pixels, int or (H, W); position embeddings are resized as Google does; None keeps the file's size.
    num_classes: None keeps the file's head (and pre_logits); a number gives a zero head of that size on the pooled
      token and drops pre_logits. config: a configuration or its name, only checked against the file (its dropout
      rates are taken over). in_chans: channels of the images; None keeps the file's (`adapt_channels`).
    dtype: of the parameters; float64 is the check that tells right from nearly right.
    ValueError: names what was expected and what the file has. FileNotFoundError: no such file.
    """
    with Archive(path) as archive:
        found = config_of(archive)
        if config is not None:
            found = check_config(found, config, path)
        if archive.repairs:
            log.info("%s differs from the published layout: %s.", archive.path.name, "; ".join(archive.repairs))
        return fill_model(archive, found, grid_of(archive, found, img_size), table, head=("head/kernel", "head/bias"),
                          pre_logits=("pre_logits/kernel", "pre_logits/bias"), img_size=img_size,
                          num_classes=num_classes, in_chans=in_chans, dtype=dtype)


# --- Save ------------------------------------------------------------------------------------------------------------

def google_arrays(model: VisionTransformer) -> dict[str, np.ndarray]:
    """The parameters under Google's keys and in Google's shapes, as views of the model's own memory."""
    parameters = {name: value.detach().cpu().numpy() for name, value in model.state_dict().items()}
    arrays = {}
    for row in table(model):
        array = parameters[row.parameter]
        if row.third is not None:
            array = np.split(array, 3)[row.third]
        arrays[row.key] = row.layout.google(array, model.config.num_heads)
    return arrays


def google_shapes(model: VisionTransformer) -> dict[str, tuple[int, ...]]:
    """The shape of each array that `save_npz` would write; no value is looked at (the meta device will do)."""
    shapes = {name: list(value.shape) for name, value in model.named_parameters()}
    return {row.key: google_shape([shapes[row.parameter][0] // (1 if row.third is None else 3),
                                    *shapes[row.parameter][1:]], row, model.config) for row in table(model)}


def save_npz(model: VisionTransformer, path, *, dtype=None) -> None:
    """Writes Google's layout (old names, group norms (1, 1, 1, C)); atomic. dtype: numpy's, e.g. "float16"; None keeps.

    A grid that is not square is kept in an extra array `grid`. ValueError: the model has values that the layout
    cannot carry (another GELU, norm epsilon or normalisation than Google's).
    """
    google = with_channels(CONFIGS["ViT-B_16"], model.config.in_chans)
    for field in ("gelu", "norm_eps", "mean", "std"):
        if model.config[field] != google[field]:
            raise ValueError(f"An .npz cannot carry {field} = {model.config[field]}: Google's files mean "
                             f"{google[field]}. Save this model as .safetensors.")
    if model.config.pos_embed != "learned":
        log.info("An .npz has no word for fixed positions: what is loaded from it computes the same, and trains them.")
    arrays = {key: np.ascontiguousarray(array, dtype=dtype or array.dtype)
              for key, array in google_arrays(model).items()}
    if model.grid[0] != model.grid[1]:
        arrays["grid"] = np.array(model.grid)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    try:
        with open(temporary, "wb") as file:
            np.savez(file, **arrays)
            file.flush()
            os.fsync(file.fileno())  # the rename must not reach the disk before the arrays do
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
