"""Hugging Face: the names of transformers' ViT, the cards beside its weights, and folders that it reads.

A folder is `config.json`, `preprocessor_config.json` and `model.safetensors`, for `ViTForImageClassification`
(`modeling_vit.py`, `configuration_vit.py` and `image_processing_vit.py` of transformers 4.48 to 5.23).
"""

import json
import os
import shutil
from pathlib import Path

import torch
from torch import Tensor

from models.modeling import VisionTransformer
from models.tensors import record, write

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
CARD, PREPROCESSOR = "config.json", "preprocessor_config.json"

# transformers' ViT -> ours, to be replaced in this order; where there are two, the second is the name since 5.0, which
# reads the first as well. Sources: `modeling_vit.py`, `conversion_mapping.py`.
NAMES = (
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

GELU = {"gelu_pytorch_tanh": "tanh", "gelu": "erf", "gelu_new": "tanh"}  # hidden_act -> ours; the first two are written


# --- Read ------------------------------------------------------------------------------------------------------------

def our_names(names) -> dict[str, str]:
    """Name in a file of transformers -> ours.

    A classifier sees the bare token: a pooler beside one belongs to no computation of ours and stays unknown.
    """
    ours = {name: name.removeprefix("vit.") for name in names}
    for theirs, our in NAMES:
        if theirs != "pooler.dense." or "classifier.weight" not in ours:
            ours = {name: key.replace(theirs, our) for name, key in ours.items()}
    return ours


def weights_in(folder) -> Path:
    """The file of weights in a folder as the hub has it, or in a model's folder of the hub's cache.

    ValueError: there is none, or they are in several files.
    """
    folder = Path(folder)
    if (folder / "refs" / "main").is_file():  # of the cache: models--OWNER--NAME
        folder = folder / "snapshots" / (folder / "refs" / "main").read_text(encoding="utf-8").strip()
    for name in WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    if any((folder / f"{name}.index.json").exists() for name in WEIGHTS):
        raise ValueError(f"{folder} holds its weights in several files, which is not read here. Save them with "
                         "save_pretrained(folder, max_shard_size='100GB').")
    if (folder / "last.safetensors").is_file():
        raise ValueError(f"{folder} is the folder of a run: name the file, {folder / 'last.safetensors'}.")
    raise ValueError(f"{folder} is a folder without {' or '.join(WEIGHTS)}. Name a Hugging Face folder, or the file of "
                     "weights itself.")


def cards(weights: Path) -> tuple[dict, dict]:
    """`config.json` (timm's too) and `preprocessor_config.json` beside the weights; {} for what is not there."""
    found = []
    for path in (weights.with_name(CARD), weights.with_name(PREPROCESSOR)):
        try:
            card = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        except (ValueError, OSError) as error:
            raise ValueError(f"{path} is not JSON ({error}). Correct it or move it away.") from error
        found.append(card if isinstance(card, dict) else {})
    return tuple(found)


def conventions(path: Path, card: dict, preprocessor: dict) -> dict:
    """What the cards record of a configuration's fields gelu, norm_eps, mean and std (numbers, or one a channel)."""
    recorded = {}
    if "hidden_act" in card:
        if card["hidden_act"] not in GELU:
            raise ValueError(f"{path}: {CARD} beside it says hidden_act '{card['hidden_act']}'; known are "
                             f"{', '.join(GELU)}.")
        if card.get("pooler_act", "tanh") != "tanh":
            raise ValueError(f"{path}: {CARD} beside it says pooler_act '{card['pooler_act']}'; only tanh is known.")
        recorded = {"gelu": GELU[card["hidden_act"]], "norm_eps": float(card.get("layer_norm_eps", 1e-12))}
    # (x * factor - mean) / std, where ours is (x / 255 - mean) / std
    factor = preprocessor.get("rescale_factor", 1 / 255) if preprocessor.get("do_rescale", True) else 1
    normalisation = {"mean": preprocessor.get("image_mean"), "std": preprocessor.get("image_std")}
    if preprocessor and not preprocessor.get("do_normalize", True):
        normalisation = {"mean": 0.0, "std": 1.0}
    for field, values in normalisation.items():
        if values is not None:
            values = values if isinstance(values, list) else [values]
            recorded[field] = tuple(float(value) / round(255 * factor, 6) for value in values)
    return recorded


def classes(card: dict) -> list[str]:
    """The names of the classes in the order of their labels; [] where they are only numbered."""
    names = card.get("id2label") or {}
    try:
        names = [names[key] for key in sorted(names, key=int)]
    except (ValueError, TypeError, AttributeError):
        return []
    return [] if all(str(name) == f"LABEL_{i}" for i, name in enumerate(names)) else names


# --- Write -----------------------------------------------------------------------------------------------------------

def save_folder(model: VisionTransformer, folder, metadata: dict, *, dtype: torch.dtype | None = None,
                overwrite: bool = False) -> None:
    """Writes a folder that `transformers.ViTForImageClassification.from_pretrained` reads with nothing left over.

    metadata: as for `exchange.save`; its `classes` name the labels. A model without head becomes one without labels,
    whose logits are the features. dtype: of the stored tensors, None keeps theirs. Atomic: a folder is there whole or
    as it was; overwrite replaces one that holds such a model and nothing else.
    ValueError: Hugging Face's ViT cannot hold the model, or the folder is not free.
    """
    folder = Path(folder)
    card = card_of(model, metadata)
    check_free(folder, overwrite)
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}.part")
    temporary.mkdir(parents=True)
    try:
        for name, content in ((CARD, card), (PREPROCESSOR, _preprocessor(model))):
            (temporary / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        write(_their_tensors(model, dtype), temporary / WEIGHTS[0], record(model, metadata))
        put(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def put(new: Path, folder: Path) -> None:
    """Moves a folder to where another is or may be. Whatever goes wrong, the other one is back in its place."""
    old = folder.with_name(f"{folder.name}.{os.getpid()}.old")
    try:
        if folder.exists():
            os.rename(folder, old)
        os.rename(new, folder)
    except BaseException:
        if old.exists() and not folder.exists():
            os.rename(old, folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def card_of(model: VisionTransformer, metadata: dict) -> dict:
    """`config.json`. ValueError: what it cannot say."""
    config = model.config
    lacks = ("no ResNet stem" if config.resnet is not None else
             "no mean over the tokens" if config.classifier == "gap" else
             "no layer (pre_logits) before its classifier" if config.representation_size else None)
    if lacks:
        raise ValueError(f"Hugging Face's ViT has {lacks}, so it cannot hold this model ({config.name}). "
                         "Write it as .safetensors, .npz or .onnx.")
    names = metadata.get("classes") or [f"LABEL_{i}" for i in range(model.num_classes)]
    if len(names) != model.num_classes:
        raise ValueError(f"There are {len(names)} names of classes for a model of {model.num_classes} classes.")

    def pair(size):  # one number where both are equal, as every reader of the format knows it
        return size[0] if size[0] == size[1] else list(size)
    return {
        "architectures": ["ViTForImageClassification"], "model_type": "vit",
        "hidden_size": config.hidden_size, "intermediate_size": config.mlp_dim,
        "num_hidden_layers": config.num_layers, "num_attention_heads": config.num_heads,
        "hidden_act": next(theirs for theirs, ours in GELU.items() if ours == config.gelu),
        "layer_norm_eps": config.norm_eps, "qkv_bias": True,
        "hidden_dropout_prob": config.dropout_rate, "attention_probs_dropout_prob": config.attention_dropout_rate,
        "image_size": pair(model.img_size), "patch_size": pair(config.patch_size), "num_channels": config.in_chans,
        "initializer_range": 0.02, "encoder_stride": config.patch_size[0],
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
    }


def _preprocessor(model: VisionTransformer) -> dict:
    """`preprocessor_config.json`: to the model's size, bilinear, and the normalisation that the weights expect."""
    height, width = model.img_size
    return {
        "image_processor_type": "ViTImageProcessor", "do_resize": True, "size": {"height": height, "width": width},
        "resample": 2, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
        "image_mean": list(model.config.mean), "image_std": list(model.config.std),
    }


def _their_tensors(model: VisionTransformer, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The parameters under the names that every version of transformers reads, those before 5.0."""
    theirs = {ours: their for their, ours in reversed(NAMES)}
    tensors = {}
    for name, value in model.state_dict().items():
        value = value.detach().to("cpu", dtype or value.dtype).contiguous()
        parts = zip(("query", "key", "value"), value.chunk(3)) if ".attn.qkv." in name else [("qkv", value)]
        for part, third in parts:
            key = name.replace("qkv", part)
            for ours, their in theirs.items():
                key = key.replace(ours, their)
            tensors[key if key.startswith("classifier.") else f"vit.{key}"] = third
    return tensors


def check_free(folder: Path, overwrite: bool) -> None:
    """ValueError: something is there that must not, or shall not, be replaced."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; a folder would go there. Choose another name.")
    inside = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if not inside:
        return
    others = sorted(inside - {CARD, PREPROCESSOR, WEIGHTS[0]})
    if others or CARD not in inside:
        raise ValueError(f"{folder} holds other things than a Hugging Face model ({', '.join(others or inside)}) and "
                         "is never replaced. Choose another folder.")
    if not overwrite:
        raise ValueError(f"{folder} holds a model already. Choose another folder, or --overwrite it.")


@torch.no_grad()
def logits(folder, images: Tensor) -> Tensor:
    """The logits (B, C) that transformers itself computes from a folder, for normalised images (B, in_chans, H, W).

    ValueError: transformers is missing, or it does not find every weight there.
    """
    try:
        from transformers import ViTForImageClassification
        from transformers.utils import logging as said
    except ImportError as error:
        raise ValueError("transformers is not installed: pip install transformers.") from error
    said.disable_progress_bar()
    model, found = ViTForImageClassification.from_pretrained(folder, output_loading_info=True)
    if wrong := {what: keys for what, keys in found.items() if keys}:
        raise ValueError(f"transformers does not find what it expects in {folder}: {wrong}.")
    return model.float().eval()(pixel_values=images).logits
