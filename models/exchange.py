"""The other layouts <-> our parameters: ours, timm's, transformers' and ViT-pytorch's, as `.safetensors` or torch.save.

Our parameters have timm's names, so timm's files need no table. As in `models/npz.py`, reading is strict and goes
tensor by tensor straight into the parameters. What no tensor tells (GELU form, norm epsilon, normalisation) is taken
from the record in our own files or from the card beside other people's; what nobody recorded is Google's, and said.
"""

import functools
import logging
import math
import re
from pathlib import Path

import numpy as np
import torch
from ml_collections import FrozenConfigDict
from torch import Tensor

from models import huggingface, npz, published
from models.configs import CONFIGS, get_config, replace
from models.fill import Row, classes_of, fill_model, is_square, native_size, square_or_told, with_channels
from models.modeling import VisionTransformer, grid_size
from models.npz import Identity, check_config, named, structure
from models.tensors import kind_of, open_file, record, write

log = logging.getLogger(__name__)

HEAD = ("head.weight", "head.bias")
PRE_LOGITS = ("pre_logits.fc.weight", "pre_logits.fc.bias")

# jeonsworld/ViT-pytorch (`models/modeling.py`) -> ours, to be replaced in this order.
VIT_PYTORCH = (
    ("transformer.embeddings.cls_token", "cls_token"),
    ("transformer.embeddings.position_embeddings", "pos_embed"),
    ("transformer.embeddings.patch_embeddings.", "patch_embed.proj."),
    ("transformer.encoder.layer.", "blocks."),
    ("transformer.encoder.encoder_norm.", "norm."),
    (".attention_norm.", ".norm1."),
    (".attn.out.", ".attn.proj."),
    (".ffn_norm.", ".norm2."),
    (".ffn.", ".mlp."),
)

# Of timm's tags (`vit_base_patch16_224.TAG_in21k`) these are Google's weights. "augreg2" is not: timm fine-tuned it.
GOOGLE_TAGS = ("augreg", "orig", "sam")

# Parts of other models that ours does not have, by what is in their tensors' names.
FOREIGN = {
    "dist_token": "a distillation token", "distillation_token": "a distillation token", "reg_token": "register tokens",
    ".ls1.": "LayerScale", "layer_scale": "LayerScale", "fc_norm.": "a norm after the pooling",
    "norm_pre.": "a norm before the blocks", ".q_norm.": "norms of queries and keys", "attn_pool.": "attention pooling",
    "relative_position": "relative positions", "mask_token": "a mask token",
}


# --- The file --------------------------------------------------------------------------------------------------------

class Weights:
    """An open file of any layout but Google's, seen under our names; used as `archive.Archive` is.

    `shapes` and `dtypes` by our name, `read(key)`; `layout` (whose names these were) and `repairs`; `record`: our own
    header, or {}.
    FileNotFoundError: no such file. ValueError: it cannot be read, or another model's.
    """

    threads = 4  # that may read at a time

    def __init__(self, path):
        path = Path(path)
        self.path = huggingface.weights_in(path) if path.is_dir() else path
        self._file = open_file(self.path)
        self.record, self.repairs = self._file.header, self._file.repairs
        self.conventions, self.assumed = "", tuple(self.record.get("assumed", ()))  # `config_of` may tell more
        self.layout, ours = _our_names(self._file.shapes)
        if self.layout == "timm" and self.record:
            self.layout = "ours"
        self._names = {key: name for name, key in ours.items()}
        if double := sorted(set(ours) - set(self._names.values())):
            self._file.__exit__()
            raise ValueError(f"{self.path} holds two tensors for one parameter: '{double[0]}' is '{ours[double[0]]}' "
                             "here, and so is another.")
        self.shapes = {key: self._file.shapes[name] for key, name in self._names.items()}
        self.dtypes = {key: self._file.dtypes[name] for key, name in self._names.items()}

    @functools.cached_property
    def cards(self) -> tuple[dict, dict]:
        """`config.json` and `preprocessor_config.json` beside the file; {} for none, and where our record tells all."""
        return ({}, {}) if self.record else huggingface.cards(self.path)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._file.__exit__(*error)

    def read(self, key: str) -> np.ndarray:
        """The tensor, valid until this thread reads again."""
        return self._file.read(self._names[key])


def _our_names(names) -> tuple[str, dict[str, str]]:
    """(whose names these are, name in the file -> our name)"""
    if any(name.endswith("embeddings.cls_token") and not name.startswith("transformer.") for name in names):
        return "transformers", huggingface.our_names(names)
    if any(name.startswith("transformer.embeddings.") for name in names):
        ours = {name: name for name in names}
        for theirs, our in VIT_PYTORCH:
            ours = {name: key.replace(theirs, our) for name, key in ours.items()}
        return "ViT-pytorch", ours
    return "timm", {name: name for name in names}


# --- The configuration -----------------------------------------------------------------------------------------------

def config_of(file: Weights, asked: FrozenConfigDict | None = None, google: bool = False) -> FrozenConfigDict:
    """The configuration of a file: from our record, else from the shapes and from the card beside it."""
    if file.record:
        try:
            return config_in(file.record)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{file.path} was written by another version of this toolkit: {error.args[0]}.") from error
    found, channels = _found(file)
    heads = _heads(file, found, asked)
    config = with_channels(named({**found, "num_heads": heads}), channels)
    config = replace(config, representation_size=classes_of(file.shapes, PRE_LOGITS[1]) or None)
    return config if google else replace(config, **_conventions(file, config))


def config_in(record: dict) -> FrozenConfigDict:
    """The configuration in a record of ours (`tensors.record`). KeyError, TypeError: it holds none, or another kind."""
    return replace(CONFIGS["ViT-B_16"], **_tuples(record["config"]))


def _tuples(value):
    """JSON knows lists only; a configuration has tuples."""
    if isinstance(value, dict):
        return {key: _tuples(entry) for key, entry in value.items()}
    return tuple(value) if isinstance(value, list) else value


def _found(file: Weights) -> tuple[dict, int]:
    """(structure as the shapes tell it, channels of the images). ValueError: another kind of model."""
    shapes = file.shapes
    if any(".hybrid_model." in name for name in shapes):
        raise ValueError(f"{file.path} is a hybrid of ViT-pytorch, whose ResNet stem (padding, pooling, norms) computes"
                         " something else than Google's and ours. Start from Google's .npz.")
    foreign = next(((name, what) for name in shapes for part, what in FOREIGN.items() if part in name), None)
    if foreign:
        raise ValueError(f"{file.path} has {foreign[1]} ('{foreign[0]}'), which Google's models do not have: it cannot "
                         "be computed here.")
    root = next((name for name in ("patch_embed.backbone.stem.conv.weight", "patch_embed.backbone.conv.weight")
                 if name in shapes), None)
    try:
        width, channels, patch_h, patch_w = shapes["patch_embed.proj.weight"]
        channels = shapes[root][1] if root else channels
        blocks = {int(match[1]) for match in map(re.compile(r"blocks\.(\d+)\.").match, shapes) if match}
        if 0 in (width, channels, patch_h, patch_w, shapes["blocks.0.mlp.fc1.weight"][0]):
            raise ValueError
        return {"patch_size": (patch_h, patch_w), "hidden_size": width,
                "mlp_dim": shapes["blocks.0.mlp.fc1.weight"][0], "num_layers": len(blocks),
                "resnet": _stem(shapes, shapes[root][0]) if root else None,
                "classifier": "token" if "cls_token" in shapes else "gap"}, channels
    except (KeyError, ValueError, IndexError) as error:
        what = f"a tensor {error}" if isinstance(error, KeyError) else "tensors of its shapes"
        raise ValueError(f"{file.path} is no Vision Transformer with timm's, transformers', ViT-pytorch's or our names:"
                         f" expected {what}, found {', '.join(list(shapes)[:3]) or 'nothing'} ...") from error


def _stem(shapes, width: int) -> dict:
    """The hybrid's stem by its names."""
    units = {re.match(r"patch_embed\.backbone\.stages\.(\d+)\.blocks\.(\d+)\.", key) for key in shapes}
    units = {(int(match[1]), int(match[2])) for match in units if match}
    stages = 1 + max((stage for stage, _ in units), default=-1)
    return {"num_layers": tuple(sum(s == stage for s, _ in units) for stage in range(stages)),
            "width_factor": width / 64}


def _heads(file: Weights, found: dict, asked: FrozenConfigDict | None) -> int:
    """The number of heads: from the card, what was asked for, or the published model built like this, pooling apart.

    ValueError: none of these tells it.
    """
    card, _ = file.cards
    heads = card.get("num_attention_heads") or (card.get("model_args") or {}).get("num_heads")
    if heads and (not isinstance(heads, int) or found["hidden_size"] % heads):
        raise ValueError(f"{file.path}: config.json beside it says {heads} attention heads, and the width is "
                         f"{found['hidden_size']}. Correct it there.")
    heads = heads or (asked and asked.num_heads) or next(
        (c.num_heads for c in CONFIGS.values() if c.name != "ViT-CIFAR"  # whose 12 heads nobody else's model has
         and structure(c) == structure({**found, "num_heads": c.num_heads, "classifier": c.classifier})), None)
    if heads is None:
        raise ValueError(f"{file.path} does not tell its number of attention heads, and no published model has its "
                         f"structure (width {found['hidden_size']}, {found['num_layers']} layers, patch "
                         f"{found['patch_size'][0]} x {found['patch_size'][1]}). Name the model (--model_type), or put "
                         'a config.json with {"num_attention_heads": N} beside the file.')
    return heads


def _conventions(file: Weights, config: FrozenConfigDict) -> dict:
    """The fields of a configuration that no tensor tells, as far as they are recorded; sets the file's `conventions`,
    a sentence on them, and `assumed`, those that are not recorded."""
    card, preprocessor = file.cards
    if file.layout == "ViT-pytorch":
        who, found = "ViT-pytorch's code", {"gelu": "erf", "norm_eps": 1e-6, "mean": [0.5], "std": [0.5]}
    elif "architecture" in card:
        who, found = _timm(file, card)
    else:
        who, found = "the card beside it", huggingface.conventions(file.path, card, preprocessor)
    for field in {"mean", "std"} & set(found):
        values = found[field]
        if len(values) != config.in_chans and len(set(values)) != 1:
            raise ValueError(f"{file.path}: {who} gives a {field} for {len(values)} channels, and the weights are for "
                             f"{config.in_chans}. Correct it there.")
        found[field] = tuple(values) if len(values) == config.in_chans else (values[0],) * config.in_chans
    names = {"gelu": "GELU", "norm_eps": "norm epsilon", "mean": "mean", "std": "deviation"}
    said = [", ".join(f"{name} {(found if known else config)[field]}" for field, name in names.items()
                      if (field in found) == known) for known in (True, False)]
    said = [f"{who} says {said[0]}"] * bool(said[0]) + [f"not recorded, so as Google's: {said[1]}"] * bool(said[1])
    file.conventions, file.assumed = "; ".join(said), tuple(field for field in names if field not in found)
    return found


def _timm(file: Weights, card: dict) -> tuple[str, dict]:
    """(who tells it, what timm's `config.json` tells). ValueError: another pooling than the weights', another GELU."""
    arguments = card.get("model_args") or {}
    pretrained = {**card, **(card.get("pretrained_cfg") or {})}
    pool, token = card.get("global_pool", "token"), "cls_token" in file.shapes
    if (pool == "token") != token:
        raise ValueError(f"{file.path}: config.json beside it says global_pool '{pool}', and the weights come "
                         f"{'with' if token else 'without'} a class token: no model here computes that.")
    forms = {"gelu": "erf", "gelu_tanh": "tanh"}
    special = next((name for name in ("quickgelu", "siglip") if name in card["architecture"]), "gelu")  # varies there
    act = arguments.get("act_layer", special)
    if act not in forms:
        raise ValueError(f"{file.path}: config.json beside it says {card['architecture']}, act_layer '{act}'; known "
                         f"are {', '.join(forms)}. If it is one of these, write it there under model_args.")
    tag = pretrained.get("tag") or card["architecture"].partition(".")[2]
    google = tag.split("_")[0] in GOOGLE_TAGS and "act_layer" not in arguments  # timm computes erf, Google trained tanh
    who = f"config.json beside it ({f'tag {tag}: weights of Google, who trained with tanh' if google else act})"
    return who, {"gelu": "tanh" if google else forms[act],
                 **{key: list(pretrained[key]) for key in ("mean", "std") if pretrained.get(key)}}


# --- Grid and size ---------------------------------------------------------------------------------------------------

def _told_size(file: Weights) -> tuple[int, int] | None:
    """(H, W) that our record or a card states."""
    card, _ = file.cards
    size = file.record.get("img_size") or card.get("image_size") or \
        ((card.get("pretrained_cfg") or {}).get("input_size") or [])[1:]
    size = [size, size] if isinstance(size, int) else size
    return tuple(size) if isinstance(size, list) and list(map(type, size)) == [int, int] else None


def _own_grid(file: Weights, config) -> tuple[tuple[int, int], tuple[int, int]] | tuple[None, None]:
    """Rows and columns of the position embedding and the image size (H, W), as stated or else square; None: neither."""
    positions, told = _positions(file, config), _told_size(file)
    if told and math.prod(grid_size(config, told)) == positions:
        return grid_size(config, told), told
    if not is_square(positions):
        return None, None
    grid = (math.isqrt(positions),) * 2
    return grid, native_size(config, grid)


def _grid_and_size(file: Weights, config, img_size) -> tuple[tuple[int, int], tuple[int, int]]:
    """The same; where it is neither, img_size is taken for the file's own. ValueError: it cannot be."""
    grid, size = _own_grid(file, config)
    if grid is None:
        grid = square_or_told(file.path, _positions(file, config), config, img_size)
        size = native_size(config, grid)
    return grid, size


def _positions(file: Weights, config) -> int:
    """Patches that the position embedding is for."""
    if len(file.shapes.get("pos_embed", ())) != 3:
        raise ValueError(f"{file.path} has no 'pos_embed' (1, positions, width): not a Vision Transformer of Google's.")
    return file.shapes["pos_embed"][1] - (config.classifier == "token")


# --- What a file is --------------------------------------------------------------------------------------------------

def describe(path, config: FrozenConfigDict | str | None = None,
             img_size: int | tuple[int, int] | None = None) -> tuple[FrozenConfigDict, tuple[int, int]]:
    """What a file is, from its names and shapes alone: its configuration and the image size (H, W) it belongs to.

    config: what it should be, as in `load`; ValueError if it is not. img_size: as in `load`, for a file whose grid is
    not square and which does not tell its size.
    """
    config = get_config(config) if isinstance(config, str) else config
    if kind_of(path) == "npz":
        with npz.Archive(path) as archive:
            found = npz.config_of(archive)
            size = native_size(found, npz.grid_of(archive, found, img_size))
    else:
        with Weights(path) as file:
            found = config_of(file, config)
            size = _grid_and_size(file, found, img_size)[1]
    return (found if config is None else check_config(found, config, path)), size


def identify(path, config: FrozenConfigDict | str | None = None) -> Identity:
    """What a file of any layout is; no tensor is read. config: what it should be; tells the number of
    heads where the file does not.

    ValueError: not a file of weights, or another model's. FileNotFoundError: no such file.
    """
    config = get_config(config) if isinstance(config, str) else config
    if kind_of(path) == "npz":
        what = npz.identify(path)
        if config is not None:
            check_config(what.config, config, path)
        return what
    with Weights(path) as file:
        found = config_of(file, config)
        if config is not None:
            check_config(found, config, path)
        grid, size = _own_grid(file, found)
        dtypes = set(file.dtypes.values())
        return Identity(file.path, file.layout, file.repairs, found, grid, size, classes_of(file.shapes, HEAD[1]),
                        dtypes.pop() if len(dtypes) == 1 else "mixed", sum(map(math.prod, file.shapes.values())),
                        file.path.stat().st_size, None, (), file.assumed)


def read_metadata(path) -> dict:
    """What a file tells about itself: the record of ours; the names of the `classes` where transformers wrote them
    beside it, or, beside NAME.npz, someone wrote NAME.classes.txt, a name a line; ImageNet's for what Google fine-tuned
    on it; else {}. No tensor is read."""
    if kind_of(path) == "npz":
        names = Path(path).with_suffix(".classes.txt")
        if names.is_file():
            return {"classes": names.read_text(encoding="utf-8").splitlines()}
        what = npz.identify(path)
        return {"classes": published.imagenet_classes()} if what.num_classes == 1000 and what.family else {}
    with Weights(path) as file:
        classes = huggingface.classes(file.cards[0])
        return file.record or ({"classes": classes} if classes else {})


# --- Load and save ---------------------------------------------------------------------------------------------------

def load(path, *, img_size: int | tuple[int, int] | None = None, num_classes: int | None = None,
         config: FrozenConfigDict | str | None = None, in_chans: int | None = None,
         dtype: torch.dtype = torch.float32, google: bool = False) -> VisionTransformer:
    """A model with the weights of `path`: Google's `.npz`, ours, timm's, ViT-pytorch's, a Hugging Face folder.

    Arguments as in `npz.load_npz`; `config` also tells the number of heads where the file does not. google: the
    caller knows that Google trained these weights (tanh GELU, norm epsilon 1e-6), whatever a copy's `config.json` says.
    ValueError: names what was expected and what the file has. FileNotFoundError: no such file.
    """
    if kind_of(path) == "npz":
        return npz.load_npz(path, img_size=img_size, num_classes=num_classes, config=config, in_chans=in_chans,
                            dtype=dtype)
    config = get_config(config) if isinstance(config, str) else config
    with Weights(path) as file:
        found = config_of(file, config, google)
        if config is not None:
            found = check_config(found, config, path)
        if file.conventions:
            log.info("%s: %s.", file.path.name, file.conventions)
        if file.repairs:
            log.info("%s is not a bare state dict: %s.", file.path.name, "; ".join(file.repairs))
        grid, size = _grid_and_size(file, found, img_size)
        return fill_model(file, found, grid, lambda model: _rows(model, file), head=HEAD, pre_logits=PRE_LOGITS,
                          img_size=img_size or size, num_classes=num_classes, in_chans=in_chans, dtype=dtype)


def _rows(model: VisionTransformer, file: Weights) -> list[Row]:
    """Every tensor that a file of this model has; transformers and ViT-pytorch keep query, key and value apart."""
    apart = any(".attn.query." in key for key in file.shapes)
    rows = []
    for name, _ in model.named_parameters():
        if apart and ".attn.qkv." in name:
            rows += [Row(name.replace("qkv", part), name, third=i) for i, part in enumerate(("query", "key", "value"))]
        else:
            rows += [Row(name, name)]
    return rows


def save(model: VisionTransformer, path, metadata: dict, dtype: torch.dtype | None = None,
         weights: dict[str, Tensor] | None = None) -> None:
    """Writes our `.safetensors`: timm's names, and a header (key `vit`, JSON) that makes the file explain itself.

    The header is `record`: the model's config, img_size, grid and num_classes, and all of `metadata` (which
    JSON must be able to hold). dtype: of the stored tensors, None keeps theirs. weights: other values than the model's
    own, by the same names. Atomic: the old file or the new one.
    """
    tensors = {name: value.detach().to("cpu", dtype or value.dtype).contiguous()
               for name, value in (weights or model.state_dict()).items()}
    write(tensors, Path(path), record(model, metadata))
