"""Google's `.npz` layout <-> our parameters: one table of names, strict in both directions.

An array of the file fills exactly one parameter (or a third of the fused qkv), or is left out for a reason that is
said. Reading goes array by array straight into the parameters. Layouts: `vit_jax/checkpoint.py`, `models_vit.py`.
"""

import logging
import os
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from ml_collections import FrozenConfigDict
from torch import Tensor

from models.configs import CONFIGS, get_config, replace
from models.modeling import VisionTransformer

log = logging.getLogger(__name__)


# --- The table -------------------------------------------------------------------------------------------------------

class Layout(NamedTuple):
    """How an array lies in the file and in the parameter; both ways are views, nothing is copied."""
    ours: Callable    # Google's array -> our array
    google: Callable  # our array, number of heads -> Google's array


SAME = Layout(lambda a: a, lambda a, H: a)
DENSE = Layout(lambda a: a.T, lambda a, H: a.T)                                           # (in, out)
CONV = Layout(lambda a: a.transpose(3, 2, 0, 1), lambda a, H: a.transpose(2, 3, 1, 0))    # (h, w, in, out)
NORM4 = Layout(lambda a: a.reshape(-1), lambda a, H: a.reshape(1, 1, 1, -1))              # (1, 1, 1, C)
HEADS_IN = Layout(lambda a: a.reshape(a.shape[0], -1).T, lambda a, H: a.T.reshape(a.shape[1], H, -1))   # (D, H, d)
HEADS_BIAS = Layout(lambda a: a.reshape(-1), lambda a, H: a.reshape(H, -1))               # (H, d)
HEADS_OUT = Layout(lambda a: a.reshape(-1, a.shape[-1]).T, lambda a, H: a.T.reshape(H, -1, a.shape[0]))  # (H, d, D)


class Row(NamedTuple):
    key: str             # in the file
    parameter: str       # in our model
    layout: Layout = SAME
    third: int | None = None  # which third of the fused qkv: 0 query, 1 key, 2 value


def table(model: VisionTransformer) -> list[Row]:
    """Every array that a file of this model has, and the parameter that it fills."""
    config, rows = model.config, []
    if config.resnet is not None:
        rows += _stem_rows(config.resnet.num_layers)
    rows += _pair("embedding", "patch_embed.proj", CONV)
    if config.classifier == "token":
        rows += [Row("cls", "cls_token")]
    rows += [Row("Transformer/posembed_input/pos_embedding", "pos_embed")]
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


# --- The file --------------------------------------------------------------------------------------------------------

class Archive:
    """An open `.npz`: names, shapes and types from the headers alone; tensors are read one at a time.

    Keys are the published ones: newer names are translated here, before the table sees them.
    ValueError: not an `.npz`, damaged, or with pickled objects inside (never loaded).
    """

    def __init__(self, path):
        self.path = Path(path)
        if not self.path.exists():
            raise FileNotFoundError(f"There is no checkpoint at {self.path}.")
        try:
            self._zip = zipfile.ZipFile(self.path)
            headers = {name: _header(self._zip, name) for name in self._zip.namelist()}
        except (zipfile.BadZipFile, OSError, EOFError, ValueError) as error:
            raise ValueError(f"{self.path} is not a complete .npz file ({error}). Fetch or copy it again.") from error
        self._names = {key: name for name, key in _published_names(headers).items()}
        self.shapes = {key: headers[name][0] for key, name in self._names.items()}
        self.dtypes = {key: headers[name][1] for key, name in self._names.items()}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._zip.close()

    def read(self, key: str) -> np.ndarray:
        try:
            with self._zip.open(self._names[key]) as file:
                array = np.lib.format.read_array(file, allow_pickle=False)
        except (zipfile.BadZipFile, OSError, EOFError, ValueError) as error:
            raise ValueError(f"{self.path} is damaged at '{key}' ({error}). Fetch or copy it again.") from error
        if array.dtype.kind == "V":  # numpy has no bfloat16 and shows its bits as void: a float32's upper half
            array = (array.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        return array


def _header(archive: zipfile.ZipFile, name: str) -> tuple[tuple, np.dtype]:
    with archive.open(name) as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
    if dtype.kind not in "fiu" and dtype != np.dtype("V2"):
        raise ValueError(f"'{name}' holds {dtype} and no numbers")
    return shape, dtype


def _published_names(names) -> dict[str, str]:
    """Name in the zip -> published key. Each other way of naming is translated in its own paragraph."""
    keys = {name: name.removesuffix(".npy").replace("\\", "/") for name in names}

    # flax linen numbers the submodules of a block by class; the published files number them together.
    if any("/MlpBlock_0/" in key for key in keys.values()):
        linen = {"LayerNorm_1": "LayerNorm_2", "MultiHeadDotProductAttention_0": "MultiHeadDotProductAttention_1",
                 "MlpBlock_0": "MlpBlock_3"}
        pattern = re.compile(rf"(?<=/)({'|'.join(linen)})(?=/)")
        keys = {name: pattern.sub(lambda match: linen[match[1]], key) for name, key in keys.items()}
    return keys


def config_of(archive: Archive) -> FrozenConfigDict:
    """The configuration that the shapes tell; a published one where its structure is the same."""
    shapes = archive.shapes
    try:
        patch_h, patch_w, _, width = shapes["embedding/kernel"]
        block = "Transformer/encoderblock_0"
        heads = shapes[f"{block}/MultiHeadDotProductAttention_1/query/kernel"][1]
        mlp = shapes[f"{block}/MlpBlock_3/Dense_0/kernel"][1]
    except (KeyError, ValueError, IndexError) as error:
        raise ValueError(f"{archive.path} is no Vision Transformer of Google's: expected an array like "
                         f"{error}, found {', '.join(list(shapes)[:3]) or 'nothing'} ...") from error
    found = dict(
        patch_size=(patch_h, patch_w), hidden_size=width, mlp_dim=mlp, num_heads=heads,
        num_layers=1 + max(int(match[1]) for match in (re.match(r".*/encoderblock_(\d+)/", key) for key in shapes)
                           if match),
        resnet=None)
    if "conv_root/kernel" in shapes:
        units = [re.match(r"block(\d+)/unit(\d+)/", key) for key in shapes]
        stages = [int(match[1]) for match in units if match]
        found["resnet"] = {
            "num_layers": tuple(max(int(m[2]) for m in units if m and int(m[1]) == i + 1)
                                for i in range(max(stages, default=0))),
            "width_factor": shapes["conv_root/kernel"][-1] / 64}
    config = next((c for c in CONFIGS.values() if structure(c) == structure(FrozenConfigDict(found))), None)
    config = config or replace(CONFIGS["ViT-B_16"], name="custom", dropout_rate=0.0, **found)
    return replace(config, classifier="token" if "cls" in shapes else "gap",
                   representation_size=shapes["pre_logits/bias"][0] if "pre_logits/bias" in shapes else None)


def structure(config) -> dict:
    """What the shapes of a file determine, by field."""
    fields = ("patch_size", "hidden_size", "mlp_dim", "num_heads", "num_layers")
    resnet = config.resnet and (tuple(config.resnet.num_layers), float(config.resnet.width_factor))
    return {**{field: config[field] for field in fields}, "resnet": resnet}


def check_config(config, asked: FrozenConfigDict | str, path) -> FrozenConfigDict:
    """The file decides the structure; what was asked for must agree and may bring its own dropout rates."""
    asked = get_config(asked) if isinstance(asked, str) else asked
    have, want = structure(config), structure(asked)
    if have != want:
        differs = ", ".join(f"{name} {have[name]} instead of {want[name]}" for name in have if have[name] != want[name])
        name = f"a {config.name}" if config.name in CONFIGS else "another model"
        raise ValueError(f"{path} holds {name}, not {asked.name}: {differs}.")
    return replace(config, dropout_rate=asked.dropout_rate, attention_dropout_rate=asked.attention_dropout_rate)


# --- Load and save ---------------------------------------------------------------------------------------------------

def load_npz(path, *, img_size: int | tuple[int, int] | None = None, num_classes: int | None = None,
             config: FrozenConfigDict | str | None = None, dtype: torch.dtype = torch.float32) -> VisionTransformer:
    """A model with the weights of one of Google's files, as `vit_jax/checkpoint.py:load_pretrained` starts from them.

    img_size: pixels, int or (H, W); position embeddings are resized as Google does; None keeps the file's size.
    num_classes: None keeps the file's head (and pre_logits); a number gives a zero head of that size on the pooled
      token and drops pre_logits. config: a configuration or its name, only checked against the file (its dropout
      rates are taken over). dtype: of the parameters; float64 is the check that tells right from nearly right.
    ValueError: names what was expected and what the file has. FileNotFoundError: no such file.
    """
    with Archive(path) as archive:
        found = config_of(archive)
        if config is not None:
            found = check_config(found, config, path)
        return fill_model(archive, found, grid_of(archive, found), table, head=("head/kernel", "head/bias"),
                          pre_logits=("pre_logits/kernel", "pre_logits/bias"), img_size=img_size,
                          num_classes=num_classes, dtype=dtype)


def fill_model(source, config: FrozenConfigDict, grid: tuple[int, int], rows_of: Callable, *, head: tuple[str, str],
               pre_logits: tuple[str, str], img_size, num_classes: int | None, dtype) -> VisionTransformer:
    """A model whose every parameter is filled once from an open file; what is left out is said with its reason.

    source: has `path`, `shapes` and `read(key)`; rows_of(model): the table; head, pre_logits: their keys in the file.
    """
    classes, skipped = source.shapes.get(head[1], (0,))[0], {"grid": "it tells the shape of the position embedding"}
    if num_classes is not None:
        classes, config = num_classes, replace(config, representation_size=None)
        skipped |= dict.fromkeys(head, f"a new head of {num_classes} classes takes its place" if num_classes else
                                 "no head was asked for")
        skipped |= dict.fromkeys(pre_logits, "fine-tuning drops it, as Google does")
    with torch.device("meta"):  # no memory and no initial values for what the file fills anyway
        model = VisionTransformer(config, img_size or native_size(config, grid), classes).to(dtype)
    model.to_empty(device="cpu")
    rows = rows_of(model)
    if num_classes:
        rows = [row for row in rows if not row.parameter.startswith("head.")]
        torch.nn.init.zeros_(model.head.weight)
        torch.nn.init.zeros_(model.head.bias)
    _check_keys(source, rows, skipped)
    parameters = dict(model.named_parameters())
    filled = [row.parameter for row in rows if not row.third]  # of query, key and value the first stands for all
    assert sorted(filled) == sorted(name for name in parameters if num_classes is None or name[:5] != "head.")
    for row in rows:
        _fill(parameters[row.parameter], row, source, config, grid, model.grid)
    for key in skipped:
        if key in source.shapes and key != "grid":
            log.info("%s: '%s' not loaded: %s.", source.path.name, key, skipped[key])
    return model


def _check_keys(archive: Archive, rows: list[Row], skipped: dict[str, str]) -> None:
    wanted = {row.key for row in rows}
    missing = sorted(wanted - set(archive.shapes))
    extra = sorted(set(archive.shapes) - wanted - set(skipped))
    if missing or extra:
        said = [f"{what} {', '.join(map(repr, keys[:4]))}" + (f" and {len(keys) - 4} more" if keys[4:] else "")
                for what, keys in (("missing", missing), ("unknown", extra)) if keys]
        raise ValueError(f"{archive.path} does not fit its own architecture: {'; '.join(said)}.")


@torch.no_grad()
def _fill(parameter: Tensor, row: Row, archive: Archive, config, grid, new_grid) -> None:
    """Copies one array of the file into its parameter, or into its third of the fused qkv."""
    target = parameter if row.third is None else parameter.chunk(3)[row.third]
    resized = row.parameter == "pos_embed" and grid != new_grid
    shape = archive.shapes[row.key]
    tokens = (config.classifier == "token") + grid[0] * grid[1]
    expected = (1, tokens, target.shape[2]) if resized else _google_shape(target, row, config)
    if shape != expected and not (row.layout is NORM4 and shape == expected[-1:]):
        raise ValueError(f"{archive.path}: '{row.key}' has shape {shape}, expected {expected}.")
    source = torch.from_numpy(np.ascontiguousarray(row.layout.ours(archive.read(row.key))))
    if not torch.isfinite(source).all():
        raise ValueError(f"{archive.path}: '{row.key}' holds values that are not finite numbers. Fetch it again.")
    if resized:
        source = resize_pos_embed(source, grid, new_grid)
    target.copy_(source)


def _google_shape(target: Tensor, row: Row, config) -> tuple:
    return row.layout.google(np.broadcast_to(np.float32(0), tuple(target.shape)), config.num_heads).shape


def grid_of(archive: Archive, config) -> tuple[int, int]:
    """Rows and columns of the file's position embedding: square, or told by our extra array `grid`."""
    key = "Transformer/posembed_input/pos_embedding"
    if key not in archive.shapes:
        raise ValueError(f"{archive.path} has no '{key}': not a Vision Transformer of Google's.")
    if "grid" in archive.shapes:
        return tuple(int(n) for n in archive.read("grid"))
    positions = archive.shapes[key][1] - (config.classifier == "token")
    side = round(positions ** 0.5)
    if side * side != positions:
        raise ValueError(f"{archive.path}: {positions} positions are no square grid and the file does not say its "
                         f"shape. Add an array 'grid' of two numbers (rows, columns) to it.")
    return side, side


def native_size(config: FrozenConfigDict, grid: tuple[int, int]) -> tuple[int, int]:
    """Pixels (H, W) of the smallest image without remainder that fills `grid`."""
    scale = 1 if config.resnet is None else 2 ** (2 + max(len(config.resnet.num_layers) - 1, 0))
    return grid[0] * config.patch_size[0] * scale, grid[1] * config.patch_size[1] * scale


def resize_pos_embed(pos_embed: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """(1, [1 +] old rows * columns, D) -> (1, [1 +] new rows * columns, D), float64: bilinear with aligned corners.

    Equals Google's `scipy.ndimage.zoom(order=1)` (`interpolate_posembed`), except where a rounding of scipy's makes
    the last row or column of theirs zero: ours interpolates there as everywhere, and says so. A class row is kept.
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


def save_npz(model: VisionTransformer, path, *, dtype=None) -> None:
    """Writes Google's layout (old names, group norms (1, 1, 1, C)); atomic. dtype: numpy's, e.g. "float16"; None keeps.

    A grid that is not square is kept in an extra array `grid`. ValueError: the model has values that the layout
    cannot carry (another GELU, norm epsilon or normalisation than Google's).
    """
    google = CONFIGS["ViT-B_16"]
    for field in ("gelu", "norm_eps", "mean", "std"):
        if model.config[field] != google[field]:
            raise ValueError(f"An .npz cannot carry {field} = {model.config[field]}: Google's files mean "
                             f"{google[field]}. Save this model as .safetensors.")
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
