"""Other PyTorch readers of Google's files against Google's own numbers: `python bench/peers.py DIR [--worst]`.

On every case of an oracle (`forward/cases/*` under DIR), at every size, in float32: max|logits - Google's| over
max|Google's| for ours, timm and transformers, each as a careful person uses it out of the box, then with the settings
that it offers. timm reads the file itself, at the image size. transformers has no reader of `.npz`: it gets the arrays
that ours read, under the Hub's names, and resizes by `interpolate_pos_encoding`. What a peer cannot do is found by
trying: a note says what it raised. A peer that is not installed is left out.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import platform
import re
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from official import put_zeros, relative, zeroed_edges

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from models.npz import load_npz


class Case(NamedTuple):
    name: str
    config: dict     # `config.json`, as the oracle's README describes it
    path: Path       # the checkpoint
    expected: dict   # `expected.npz`


class Refusal(NamedTuple):
    kind: str  # the exception's name
    text: str


class Cell(NamedTuple):
    size: str
    error: float = float("nan")
    note: str = ""                  # said after the error
    refusal: Refusal | None = None  # in the place of an error


class Column(NamedTuple):
    title: str
    package: str
    logits: Callable  # Case, (H, W), images (B, 3, H, W) -> logits (B, C)


# --- timm -------------------------------------------------------------------------------------------------------------

def timm_logits(case: Case, image, images, act_layer=None):
    from timm.layers import HybridEmbed
    from timm.models.vision_transformer import VisionTransformer

    config = case.config
    options = dict(img_size=image, patch_size=tuple(config["patch_size"]), embed_dim=config["hidden_size"],
                   depth=config["num_layers"], num_heads=config["num_heads"], num_classes=config["num_classes"],
                   mlp_ratio=config["mlp_dim"] / config["hidden_size"], act_layer=act_layer)
    if config["classifier"] == "gap":
        options |= dict(class_token=False, global_pool="avg", fc_norm=False)
    if config["resnet"]:
        options["embed_layer"] = partial(HybridEmbed, backbone=timm_stem(**config["resnet"]))
    model = VisionTransformer(**options)
    model.load_pretrained(str(case.path))
    return model.eval()(images)


def timm_stem(num_layers, width_factor):
    """timm's ResNet with the arguments that its own hybrids give it."""
    from timm.layers import StdConv2dSame
    from timm.models.resnetv2 import ResNetV2, create_resnetv2_stem

    same = dict(stem_type="same", preact=False, conv_layer=partial(StdConv2dSame, eps=1e-8))
    if not num_layers:
        return create_resnetv2_stem(3, out_chs=int(64 * width_factor), **same)
    return ResNetV2(layers=num_layers, num_classes=0, global_pool="", width_factor=width_factor, **same)


# --- transformers -----------------------------------------------------------------------------------------------------

# Our name -> the Hub's, by pattern, all of them in this order; query, key and value are split before.
HUB_NAMES = ((r"^(cls_token)", r"vit.embeddings.\1"), (r"^pos_embed", "vit.embeddings.position_embeddings"),
             (r"^patch_embed\.proj", "vit.embeddings.patch_embeddings.projection"), (r"^blocks", "vit.encoder.layer"),
             (r"^norm\.", "vit.layernorm."), (r"\.norm1\.", ".layernorm_before."), (r"\.norm2\.", ".layernorm_after."),
             (r"\.attn\.proj\.", ".attention.output.dense."), (r"\.attn\.", ".attention.attention."),
             (r"\.mlp\.fc1\.", ".intermediate.dense."), (r"\.mlp\.fc2\.", ".output.dense."),
             (r"^pre_logits\.fc", "vit.pooler.dense"), (r"^head", "classifier"))


def hub_tensors(model) -> dict:
    tensors = {}
    for ours, value in model.state_dict().items():
        thirds = zip(("query", "key", "value"), value.chunk(3)) if ".qkv." in ours else (("qkv", value),)
        for name, part in thirds:
            theirs = ours.replace("qkv", name)
            for pattern, put in HUB_NAMES:
                theirs = re.sub(pattern, put, theirs)
            tensors[theirs] = part.clone()
    return tensors


def transformers_logits(case: Case, image, images, **settings):
    import transformers

    config, native = case.config, case.config["sizes"]["native"]["image"]
    if config["resnet"]:
        transformers.ViTHybridForImageClassification  # noqa: B018 (raises where there is none)
        raise NotImplementedError("this version still has a hybrid, which is not compared here")
    options = transformers.ViTConfig(
        hidden_size=config["hidden_size"], intermediate_size=config["mlp_dim"], num_hidden_layers=config["num_layers"],
        num_attention_heads=config["num_heads"], num_labels=config["num_classes"], image_size=native[0],
        patch_size=config["patch_size"][0], **settings)
    model, found = transformers.ViTForImageClassification.from_pretrained(
        None, config=options, state_dict=hub_tensors(load_npz(case.path)), ignore_mismatched_sizes=True,
        output_loading_info=True)
    for what in ("missing", "mismatched"):  # it goes on with random values; a careful person does not
        if found[f"{what}_keys"]:
            raise ValueError(f"weights {what}, such as {min(map(str, found[f'{what}_keys']))}")
    return model.eval()(images, interpolate_pos_encoding=list(image) != native).logits


# --- the table --------------------------------------------------------------------------------------------------------

def our_logits(case: Case, image, images, edges=()):
    model = load_npz(case.path, img_size=image).eval()
    put_zeros(model, edges)
    return model(images)


COLUMNS = (
    Column("ours", "torch", our_logits),
    Column("timm", "timm", timm_logits),
    Column("timm, tanh GELU", "timm", partial(timm_logits, act_layer=partial(torch.nn.GELU, approximate="tanh"))),
    Column("transformers", "transformers", transformers_logits),
    Column("transformers, tanh GELU, norm epsilon 1e-6", "transformers",
           partial(transformers_logits, hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6)),
)


@torch.no_grad()
def compare(column: Column, case: Case, size: str) -> Cell:
    """One number, or what was raised. Where Google's resize zeroes an edge, ours is also said with that edge."""
    about, google = case.config["sizes"][size], case.expected[f"logits_{size}_f32"]
    images = torch.from_numpy(case.expected[f"image_{size}"]).permute(0, 3, 1, 2).contiguous()
    image, note = tuple(about["image"]), ""
    try:
        error = relative(column.logits(case, image, images), google)
        edges = zeroed_edges(case.config["sizes"]["native"]["grid"], about["grid"])
        if column.logits is our_logits and edges:
            note = f" ({relative(our_logits(case, image, images, edges), google):.1e} with Google's zero edge)"
        return Cell(size, error, note)
    except Exception as error:  # the comparison is of what each can do: whatever it raises is its answer
        return Cell(size, refusal=Refusal(type(error).__name__, f"{column.package}: {reason(error)}"))


def reason(error: Exception) -> str:
    """The first line of a message; of a bare assertion the line that failed."""
    message = str(error).strip().split("\n")[0] or traceback.extract_tb(error.__traceback__)[-1].line
    return message if len(message) <= 110 else message[:107] + "..."


def read_cases(folder: Path):
    for path in sorted(folder.glob("**/expected.npz")):
        with np.load(path) as file:
            yield Case(path.parent.name, json.loads(path.with_name("config.json").read_text()),
                       path.with_name("checkpoint.npz"), dict(file))


def cell_text(cells: list[Cell], notes: list[Refusal]) -> str:
    """A cell of the table: one size, or the worst of several with its name; the reasons of refusals go to `notes`."""
    refused = [cell for cell in cells if cell.refusal]
    reasons = list(dict.fromkeys(cell.refusal for cell in refused))
    notes += [reason for reason in reasons if reason not in notes]
    marks = ", ".join(f"{reason.kind} [{notes.index(reason) + 1}]" for reason in reasons)
    if len(refused) == len(cells):
        return f"no: {marks}"
    worst = max((cell for cell in cells if not cell.refusal), key=lambda cell: (np.isnan(cell.error), cell.error))
    text = f"{worst.error:.1e}{f' {worst.size}' if len(cells) > 1 else ''}{worst.note}"
    return f"{text}; no {' '.join(cell.size for cell in refused)}: {marks}" if refused else text


def print_table(cases, columns: list[Column], worst: bool) -> int:
    notes, rows = [], 0
    print(f"| case | size | {' | '.join(column.title for column in columns)} |\n|---|---|{'---|' * len(columns)}")
    for case in cases:
        sizes = list(case.config["sizes"])
        for group in [sizes] if worst else [[size] for size in sizes]:
            texts = [cell_text([compare(column, case, size) for size in group], notes) for column in columns]
            label = group[0] if len(group) == 1 else f"worst of {len(group)}"
            print(f"| {case.name} | {label} | {' | '.join(texts)} |", flush=True)
            rows += 1
    print()
    for number, note in enumerate(notes, 1):
        print(f"[{number}] {note.text}")
    return rows


def processor() -> str:
    try:
        name = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())[1]
    except (OSError, TypeError):
        name = platform.processor() or platform.machine()
    return f"{name} ({torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads)"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--worst", action="store_true", help="one row a case: of each column its worst size")
    args = parser.parse_args()
    packages = {package: bool(importlib.util.find_spec(package)) for package in ("torch", "timm", "transformers")}
    if packages["transformers"]:
        from transformers.utils import logging
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    if not print_table(read_cases(args.folder), [c for c in COLUMNS if packages[c.package]], args.worst):
        print(f"Nothing to compare in {args.folder}: expected forward/cases/*/expected.npz.")
        return 2
    told = [f"{name} {importlib.metadata.version(name) if found else 'is not installed'}"
            for name, found in packages.items()]
    print(f"\nfloat32, max|logits - Google's| / max|Google's|. {', '.join(told)}. {processor()}.")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
