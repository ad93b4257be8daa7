"""The other layouts <-> our parameters: our self-describing `.safetensors`, timm's, Hugging Face's `google/vit-*`.

Our parameters have timm's names, so timm's files need no table; transformers' names have one below. As in
`models/npz.py`, reading is strict and goes tensor by tensor straight into the parameters.
"""

import json
import logging
import os
import re
from pathlib import Path

import numpy as np
import torch
from ml_collections import FrozenConfigDict
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from models import npz
from models.configs import CONFIGS, get_config, replace
from models.modeling import VisionTransformer, grid_size
from models.npz import Row, check_config, fill_model, structure

log = logging.getLogger(__name__)

HEAD = ("head.weight", "head.bias")
PRE_LOGITS = ("pre_logits.fc.weight", "pre_logits.fc.bias")

# transformers' ViT -> ours, to be replaced in this order; where there are two, the second is the name since 5.0.
# Sources: transformers `modeling_vit.py`, `conversion_mapping.py`.
HUGGING_FACE = (
    ("embeddings.cls_token", "cls_token"),
    ("embeddings.position_embeddings", "pos_embed"),
    ("embeddings.patch_embeddings.projection.", "patch_embed.proj."),
    ("encoder.layer.", "blocks."), ("layers.", "blocks."),
    (".layernorm_before.", ".norm1."),
    (".attention.attention.query.", ".attn.query."), (".attention.q_proj.", ".attn.query."),
    (".attention.attention.key.", ".attn.key."), (".attention.k_proj.", ".attn.key."),
    (".attention.attention.value.", ".attn.value."), (".attention.v_proj.", ".attn.value."),
    (".attention.output.dense.", ".attn.proj."), (".attention.o_proj.", ".attn.proj."),
    (".layernorm_after.", ".norm2."),
    (".intermediate.dense.", ".mlp.fc1."),
    (".output.dense.", ".mlp.fc2."),
    ("layernorm.", "norm."),
    ("pooler.dense.", "pre_logits.fc."),  # Google's pre_logits, tanh included
    ("classifier.", "head."),
)

# Of timm's tags (`vit_base_patch16_224.TAG_in21k`) these are Google's weights. "augreg2" is not: timm fine-tuned it.
GOOGLE_TAGS = ("augreg", "orig", "sam")


# --- The file --------------------------------------------------------------------------------------------------------

class Tensors:
    """An open `.safetensors`, used as `npz.Archive` is: `path`, `shapes`, `read(key)`; `record` is our header, or {}.

    FileNotFoundError: no such file. ValueError: not a `.safetensors`, or damaged.
    """

    def __init__(self, path):
        self.path = Path(path)
        if not self.path.exists():
            raise FileNotFoundError(f"There is no checkpoint at {self.path}.")
        try:
            self._file = safe_open(self.path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{self.path} is not a complete .safetensors file ({error}). "
                             "Fetch or copy it again.") from error
        self.record = json.loads((self._file.metadata() or {}).get("vit", "{}"))
        self._names = _our_names(self._file.keys())
        self.shapes = {key: tuple(self._file.get_slice(name).get_shape()) for key, name in self._names.items()}

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._file.__exit__(*error)

    def read(self, key: str) -> np.ndarray:
        tensor = self._file.get_tensor(self._names[key])
        return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()  # numpy has no bfloat16


def _our_names(names) -> dict[str, str]:
    """Our name -> name in the file. Each other way of naming is translated in its own paragraph."""
    keys = {name: name for name in names}

    # transformers: with `vit.` before the names where a classifier was saved. Its classifier sees the bare token: a
    # pooler beside one belongs to no computation of ours and stays unknown.
    if any(name.endswith("embeddings.cls_token") for name in names):
        keys = {name: name.removeprefix("vit.") for name in names}
        for theirs, ours in HUGGING_FACE:
            if theirs == "pooler.dense." and "classifier.weight" in names:
                continue
            keys = {name: key.replace(theirs, ours) for name, key in keys.items()}
    return {key: name for name, key in keys.items()}


def read_metadata(path) -> dict:
    """What one of our files tells about itself (its header's `vit`); {} for any other. No tensor is read."""
    if Path(path).suffix != ".safetensors":
        return {}
    with Tensors(path) as file:
        return file.record


# --- The configuration -----------------------------------------------------------------------------------------------

def config_of(file: Tensors, asked: FrozenConfigDict | None = None, google: bool = False) -> FrozenConfigDict:
    """The configuration of a file: from our header, else from the shapes and from a `config.json` beside it."""
    if file.record:
        try:
            return replace(CONFIGS["ViT-B_16"], **_tuples(file.record["config"]))
        except KeyError as error:
            raise ValueError(f"{file.path} was written by another version of this toolkit: {error}.") from error
    shapes = file.shapes
    try:
        width, _, patch_h, patch_w = shapes["patch_embed.proj.weight"]
        mlp = shapes["blocks.0.mlp.fc1.weight"][0]
    except (KeyError, ValueError) as error:
        raise ValueError(f"{file.path} is no Vision Transformer with timm's, transformers' or our names: expected a "
                         f"tensor like {error}, found {', '.join(list(shapes)[:3]) or 'nothing'} ...") from error
    blocks = [int(match[1]) for match in map(re.compile(r"blocks\.(\d+)\.").match, shapes) if match]
    found = dict(patch_size=(patch_h, patch_w), hidden_size=width, mlp_dim=mlp, num_layers=1 + max(blocks),
                 resnet=_stem_of(shapes))
    card = {} if google else _card(file.path)
    same = next((c for c in CONFIGS.values() if structure(FrozenConfigDict({**found, "num_heads": c.num_heads}))
                 == structure(c)), None)
    heads = card.get("num_attention_heads") or (asked or same or {}).get("num_heads")
    if heads is None:
        raise ValueError(f"{file.path} does not tell its number of attention heads, and no published model has its "
                         f"structure (width {width}, {found['num_layers']} layers, patch {patch_h} x {patch_w}). "
                         "Name the model: config=, on the command line --model_type.")
    config = same if same is not None and same.num_heads == heads else replace(
        CONFIGS["ViT-B_16"], name="custom", dropout_rate=0.0, num_heads=heads, **found)
    return replace(config, classifier="token" if "cls_token" in shapes else "gap",
                   representation_size=shapes.get(PRE_LOGITS[1], (None,))[0],
                   **({} if google else _conventions(file, card)))


def _tuples(value):
    """JSON knows lists only; a configuration has tuples."""
    if isinstance(value, dict):
        return {key: _tuples(entry) for key, entry in value.items()}
    return tuple(value) if isinstance(value, list) else value


def _stem_of(shapes) -> dict | None:
    """The hybrid's stem by its names; timm names a root without stages with no `.stem` before it."""
    backbone = "patch_embed.backbone"
    root = shapes.get(f"{backbone}.stem.conv.weight") or shapes.get(f"{backbone}.conv.weight")
    if root is None:
        return None
    units = [re.match(r"patch_embed\.backbone\.stages\.(\d+)\.blocks\.(\d+)\.", key) for key in shapes]
    units = [(int(match[1]), int(match[2])) for match in units if match]
    stages = 1 + max((stage for stage, _ in units), default=-1)
    return {"num_layers": tuple(1 + max((unit for s, unit in units if s == stage), default=-1)
                                for stage in range(stages)),
            "width_factor": root[0] / 64}


def _card(path: Path) -> dict:
    """The `config.json` that timm and transformers put beside their weights; {} if there is none."""
    path = path.with_name("config.json")
    try:
        card = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}). Correct it or move it away.") from error
    return card if isinstance(card, dict) else {}


def _conventions(file: Tensors, card: dict) -> dict:
    """The fields of a configuration that no tensor tells: GELU form, norm epsilon, normalisation."""
    if "hidden_act" in card:  # transformers
        forms = {"gelu": "erf", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}
        if card["hidden_act"] not in forms:
            raise ValueError(f"{file.path}: config.json beside it says hidden_act '{card['hidden_act']}'; "
                             f"known are {', '.join(forms)}.")
        gelu, eps = forms[card["hidden_act"]], card.get("layer_norm_eps", 1e-12)
        log.info("%s: config.json beside it says GELU form %s, norm epsilon %g.", file.path.name, gelu, eps)
        return {"gelu": gelu, "norm_eps": eps}
    if "architecture" in card:  # timm
        pretrained = card.get("pretrained_cfg", {})
        pool, token = card.get("global_pool", "token"), "cls_token" in file.shapes
        if (pool == "token") != token:
            raise ValueError(f"{file.path}: config.json beside it says global_pool '{pool}', and the weights come "
                             f"{'with' if token else 'without'} a class token: no model here computes that.")
        tag = pretrained.get("tag") or card["architecture"].partition(".")[2]
        gelu = "tanh" if tag.split("_")[0] in GOOGLE_TAGS else "erf"
        log.info("%s: config.json beside it says '%s': GELU form %s.", file.path.name, tag, gelu)
        return {"gelu": gelu, **{key: tuple(pretrained[key]) for key in ("mean", "std") if key in pretrained}}
    log.info("%s does not record its GELU form; taken as Google's tanh.", file.path.name)
    return {}


def _grid(file: Tensors, config, img_size) -> tuple[int, int]:
    """Rows and columns of the position embedding: from our header, else square, else those of `img_size`."""
    if file.record:
        return tuple(file.record["grid"])
    if "pos_embed" not in file.shapes:
        raise ValueError(f"{file.path} has no 'pos_embed': not a Vision Transformer of Google's.")
    positions = file.shapes["pos_embed"][1] - (config.classifier == "token")
    side = round(positions ** 0.5)
    if side * side == positions:
        return side, side
    told = img_size and grid_size(config, img_size)
    if not told or told[0] * told[1] != positions:
        raise ValueError(f"{file.path}: {positions} positions are no square grid and the file does not say its shape. "
                         "Give its own size (H, W) as img_size.")
    return told


def describe(path, config: FrozenConfigDict | str | None = None) -> tuple[FrozenConfigDict, tuple[int, int]]:
    """What a file is, from its names and shapes alone: its configuration and the image size (H, W) it belongs to.

    config: what it should be, as in `load`; ValueError if it is not.
    """
    config = get_config(config) if isinstance(config, str) else config
    with _open(path) as file:
        if isinstance(file, npz.Archive):
            found = npz.config_of(file)
            size = npz.native_size(found, npz.grid_of(file, found))
        else:
            found = config_of(file, config)
            size = tuple(file.record.get("img_size", ())) or npz.native_size(found, _grid(file, found, None))
    return (found if config is None else check_config(found, config, path)), size


def _open(path):
    path = Path(path)
    if path.suffix not in (".npz", ".safetensors"):
        raise ValueError(f"{path}: weights are read from .npz and .safetensors files, not from '{path.suffix}'.")
    return npz.Archive(path) if path.suffix == ".npz" else Tensors(path)


# --- Load and save ---------------------------------------------------------------------------------------------------

def load(path, *, img_size: int | tuple[int, int] | None = None, num_classes: int | None = None,
         config: FrozenConfigDict | str | None = None, dtype: torch.dtype = torch.float32,
         google: bool = False) -> VisionTransformer:
    """A model with the weights of `path`: Google's `.npz`, or a `.safetensors` of ours, timm's or transformers'.

    Arguments as in `npz.load_npz`; `config` also tells the number of heads where the file does not. google: the
    caller knows that Google trained these weights (tanh GELU, norm epsilon 1e-6), whatever a copy's `config.json` says.
    ValueError: names what was expected and what the file has. FileNotFoundError: no such file.
    """
    if Path(path).suffix == ".npz":
        return npz.load_npz(path, img_size=img_size, num_classes=num_classes, config=config, dtype=dtype)
    img_size = (img_size, img_size) if isinstance(img_size, int) else img_size
    config = get_config(config) if isinstance(config, str) else config
    with _open(path) as file:
        found = config_of(file, config, google)
        if config is not None:
            found = check_config(found, config, path)
        grid = _grid(file, found, img_size)
        if file.record:
            img_size = img_size or tuple(file.record["img_size"])
        return fill_model(file, found, grid, lambda model: _rows(model, file), head=HEAD, pre_logits=PRE_LOGITS,
                          img_size=img_size, num_classes=num_classes, dtype=dtype)


def _rows(model: VisionTransformer, file: Tensors) -> list[Row]:
    """Every tensor that a file of this model has; transformers keeps query, key and value apart."""
    apart = any(".attn.query." in key for key in file.shapes)
    rows = []
    for name, _ in model.named_parameters():
        if apart and ".attn.qkv." in name:
            rows += [Row(name.replace("qkv", part), name, third=i) for i, part in enumerate(("query", "key", "value"))]
        else:
            rows += [Row(name, name)]
    return rows


def save(model: VisionTransformer, path, metadata: dict, dtype: torch.dtype | None = None) -> None:
    """Writes our `.safetensors`: timm's names, and a header (key `vit`, JSON) that makes the file explain itself.

    The header has the model's config, img_size, grid and num_classes, and all of `metadata` (which JSON must be able
    to hold). dtype: of the stored tensors, None keeps theirs. Atomic: `path` is the old file or the whole new one.
    """
    path = Path(path)
    record = {**metadata, "config": model.config.to_dict(), "img_size": model.img_size, "grid": model.grid,
              "num_classes": model.num_classes}
    header = {"format": "pt", "vit": json.dumps(record)}
    tensors = {name: value.detach().to("cpu", dtype or value.dtype).contiguous()
               for name, value in model.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    try:
        try:
            save_file(tensors, temporary, metadata=header)
        except SafetensorError as error:  # its own class even for a full disk
            raise OSError(f"{path} could not be written ({error}).") from error
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())  # the rename must not reach the disk before the tensors do
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
