"""Published numbers: `bench/published.json`, and which of them stand for a cell.

A line each, every one read in the source that it names (those known from memory alone were left out, and with them the
constant field `status`). A protocol is what one source did; numbers of two are never compared.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePath
from typing import NamedTuple

from models.configs import CONFIGS
from models.published import AUGREG, FOLDERS, GOOGLE_ONLY, SIZES

FILE = Path(__file__).resolve().parent.parent / "bench" / "published.json"

# Ours -> theirs, in all spellings. The paper's R50x1 stem is the R50 of the released files.
MODELS: dict[str, tuple[str, ...]] = {
    "ViT-Ti_16": ("ViT-Ti/16",), "ViT-S_16": ("ViT-S/16",), "ViT-S_32": ("ViT-S/32",), "ViT-B_8": ("ViT-B/8",),
    "ViT-B_16": ("ViT-B/16", "ViT-B/16-224"), "ViT-B_32": ("ViT-B/32",), "ViT-L_16": ("ViT-L/16", "ViT-L/16-224"),
    "ViT-L_32": ("ViT-L/32",), "ViT-H_14": ("ViT-H/14",), "R+ViT-Ti_16": ("ViT-R+Ti/16", "R+ViT-Ti/16"),
    "R26+ViT-S_32": ("ViT-R26+S/32", "R26+ViT-S/32"), "R26+ViT-B_32": ("R26+ViT-B/32",),
    "R50+ViT-B_16": ("R50+ViT-B/16", "R50x1+ViT-B/16"),
    "R50+ViT-L_32": ("ViT-R50+L/32", "R50+ViT-L/32", "R50x1+ViT-L/32"),
    **{f"ViT-{size}-gap-norep": () for size in ("S_16", "S_32", "B_16", "B_32")}, "ViT-demo": (), "ViT-CIFAR": (),
}
FAMILIES = {"imagenet21k": "ImageNet-21k", "imagenet21k+imagenet2012": "ImageNet-21k + ImageNet", "sam": "SAM ImageNet",
            "gsam": "GSAM ImageNet", "imagenet": "ImageNet", "jft": "JFT-300M"}  # folder of the bucket -> upstream
AUGREG_BASES = {"i21k": "AugReg ImageNet-21k 300ep", "i21k_30": "AugReg ImageNet-21k 30ep",
                "i1k": "AugReg ImageNet 300ep"}
BY_V2 = "AugReg ImageNet-21k 300ep, chosen on ImageNetV2 (i21k_v2)"
# Of Table 3's picks on ImageNetV2, the one whose file can be told: of what Google made of this file timm measures 87.10
# at 384 px, the table says 87.08, and 85.59 of the file that Google's README recommends.
V2_FILE = "L_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.1-sd_0.1"
# VTAB-full is the whole training set, as ours; VTAB-1k has 1,000 images of it and never stands for it.
DATASETS = {"cifar10": ("CIFAR-10",), "cifar100": ("CIFAR-100", "VTAB-full/CIFAR-100"), "imagenet": ("ImageNet",),
            "imagenet_real": ("ImageNet-ReaL",), "pets": ("Oxford-IIIT-Pets", "VTAB-full/Pets"),
            "flowers": ("Flowers-102", "VTAB-full/Flowers102")}


class Protocol(NamedTuple):
    sources: tuple[str, ...]  # exactly as records name them, the one to compare with first
    resolution: int           # pixels, where the caller does not say
    about: str


PAPER = "Dosovitskiy et al. 2021, arXiv 2010.11929, Table"
STEINER = "Steiner et al. 2022, arXiv 2106.10270 (TMLR text), Table"
GOOGLE = "google-research/vision_transformer README.md,"
RECOMMENDED = f"{GOOGLE} AugReg recommended checkpoints"
STATED_NOT = 224  # pixels at which Table 5 of Steiner et al. is compared
PROTOCOLS = {
    "paper": Protocol((f"{PAPER} 2", f"{PAPER} 5 (appendix C)", f"{PAPER} 6 (appendix C)"), 384,
                      "learning rate chosen on a held-out part, then all of train, 384 px (ImageNet in Table 2: 512 px "
                      "and averaged weights); its dropout at fine-tuning is not stated, ours is the published "
                      "configuration's"),
    "vit_jax": Protocol((f"{GOOGLE} replication table",), 384,
                        "98 % of train (ImageNet 99 %), fixed learning rates, dropout 0 or 0.1, 384 px"),
    "augreg": Protocol((f"{STEINER} 3", f"{STEINER} 5", RECOMMENDED), 384,
                       "AugReg files; steps and learning rate chosen on a held-out part. ImageNet (Table 3): 20,000 "
                       "steps at 224 and 384 px. CIFAR-100 and Pets (Table 5): 500 or 2,500 steps and learning rates "
                       "0.001 to 0.03 on full training sets; the resolution is not stated, ours is 224 px"),
    "short": Protocol((f"{GOOGLE} short-schedule table",), 384,
                      "500 or 1,000 steps; the resolution is not stated, its times are those of 384 px; learning "
                      "rates, held-out share and momentum in bfloat16 are not stated either, ours are vit_jax's"),
    "ViT-pytorch": Protocol(("jeonsworld/ViT-pytorch README.md",), 224,
                            "all of train, no flips, learning rate 0.03, dropout 0.1; the best of the evaluations on "
                            "the test set, every 100 steps"),
    "big_vision": Protocol(("google-research/big_vision big_vision/configs/transfer.py",), 384,
                           "train without the held-out part, 384 px out of 448, mean of five runs"),
}


# --- Records ---------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Record:
    """One published number, in the source's own words."""

    model: str
    upstream: str | None
    dataset: str
    resolution: int | None
    steps: int | None
    metric: str         # of the numbers that `find` finds: top1_pct
    value: float        # percent
    std: float | None   # points
    source: str
    note: str | None

    @property
    def best_on_test(self) -> bool:
        """The best of many evaluations on the test set, which is no estimate of anything."""
        return "best test accuracy" in (self.note or "")

    @property
    def runs(self) -> int:
        """Of how many runs the number is the mean."""
        found = re.search(r"mean (?:and sd )?of (\d+)", self.note or "")
        return int(found[1]) if found else 1

    @property
    def dropout(self) -> float | None:
        found = re.search(r"dropout (\d\.\d+)", self.note or "")
        return float(found[1]) if found else None

    @property
    def protocol(self) -> str | None:
        return next((name for name, protocol in PROTOCOLS.items() if self.source in protocol.sources), None)


@cache
def records() -> list[Record]:
    """All that is known, in the order of the file."""
    return [Record(**fields) for fields in json.loads(FILE.read_text(encoding="utf-8"))]


def find(protocol: str, model: str, upstream: str, dataset: str, resolution: int | None = None,
         steps: int | None = None, dropout: float | None = None) -> list[Record]:
    """What a protocol's source says of a cell, best match first; nothing: `why_not` says the reason.

    model, dataset: our names or theirs. upstream: a folder of the bucket, a checkpoint's name or path, "imagenet",
    "jft", or theirs. resolution (pixels), steps, dropout: numbers of others are left out, unless there are only such.
    None: the protocol's resolution and the model's published dropout come first.
    ValueError: there is no such protocol.
    """
    found = _candidates(protocol, model, upstream, dataset, resolution, steps, dropout)
    return [r for r in found if not _stands_not(r, upstream, resolution)]


def withheld(protocol: str, model: str, upstream: str, dataset: str, resolution: int | None = None) -> str | None:
    """Why `find` gives nothing though the source has numbers that look like the cell's; None: it gives some, or the
    source has none. ValueError: there is no such protocol."""
    reasons = [_stands_not(r, upstream, resolution) for r in
               _candidates(protocol, model, upstream, dataset, resolution, None, None)]
    return reasons[0] if reasons and all(reasons) else None


def _candidates(protocol, model, upstream, dataset, resolution, steps, dropout) -> list[Record]:
    """`find`, with those that only look like the cell's."""
    way = _protocol(protocol)
    names, sets, starts = MODELS.get(model, (model,)), DATASETS.get(dataset, (dataset,)), upstreams(upstream)
    found = [r for r in records() if r.source in way.sources and r.metric == "top1_pct" and r.model in names
             and r.dataset in sets and rank(r.upstream, starts) is not None]
    for field, value in (("resolution", resolution), ("steps", steps), ("dropout", dropout)):
        found = [r for r in found if value is None or getattr(r, field) in (value, None)] or found
    resolution = resolution or way.resolution
    if dropout is None:
        dropout = CONFIGS[model].dropout_rate if model in CONFIGS else 0.0
    return sorted(found, key=lambda r: (r.resolution not in (resolution, None), r.dropout not in (dropout, None),
                                        rank(r.upstream, starts), way.sources.index(r.source)))


def _stands_not(record: Record, upstream: str, resolution: int | None) -> str | None:
    """Why a record is not of the start or of the resolution that it seems to be of; None: it is, as far as is known."""
    if record.source == f"{STEINER} 5" and resolution not in (None, STATED_NOT):
        return (f"{record.source}, does not state its resolution: its number {record.value} is compared with runs at "
                f"{STATED_NOT} px, at which the files were pre-trained, not with one at {resolution} px.")
    ours = upstreams(upstream)
    if family(upstream) != "augreg" or upstream == "augreg" or record.upstream not in AUGREG_BASES.values():
        return None
    same = (record.model, record.dataset, record.resolution, record.value)
    theirs = [r.upstream for r in records() if r.source == RECOMMENDED and r.upstream.startswith(
        f"{record.upstream} (") and (r.model, r.dataset, r.resolution, r.value) == same]
    if not theirs or ours[0] in theirs:
        return None
    return (f"The number {record.value} ({record.source}) is that of {theirs[0]}, says Google's README; ours started "
            f"from {ours[0]}, another file of the sweep.")


def why_not(protocol: str, model: str, upstream: str, dataset: str, resolution: int | None = None) -> str | None:
    """Why nobody outside can compare with a cell; None: one can. ValueError: there is no such protocol."""
    found, start = find(protocol, model, upstream, dataset, resolution), PurePath(upstream).name.removesuffix(".npz")
    if "jft" in upstream.lower():
        return "Weights pre-trained on JFT-300M were never released: nobody outside Google can reproduce the number."
    if upstream.lower() == "imagenet":
        return "The paper's weights of ImageNet alone were never released; AugReg's (-i1k-) and SAM's are other ones."
    if not found and AUGREG.fullmatch(start) and "--" in start:
        return "The file is already fine-tuned, and the published transfers start from those that are not."
    if not found and protocol == "paper" and model.startswith("R"):
        return ("The paper's hybrids (Table 6) start from JFT-300M, which was never released: compare with Google's "
                "README (vit_jax), or with augreg.")
    return None if found else withheld(protocol, model, upstream, dataset, resolution) or (
        f"The protocol {protocol} has no number for {model}, {upstream} on {dataset}.")


def _protocol(name: str) -> Protocol:
    if name not in PROTOCOLS:
        raise ValueError(f"Nobody published numbers of a protocol '{name}'. Known: {', '.join(PROTOCOLS)}.")
    return PROTOCOLS[name]


def family(upstream: str) -> str | None:
    """The folder of the bucket that a name or a path is of; None: it is of none, or nothing tells."""
    path = PurePath(upstream)
    stem = path.name.removesuffix(".npz").replace("-ViT-", "+ViT-")  # R50-ViT-B_16, ViT-pytorch's spelling
    if AUGREG.fullmatch(stem):
        return "augreg"
    if upstream in (*FOLDERS, *FAMILIES):
        return upstream
    if path.parent.name in FOLDERS:
        return path.parent.name
    owners = {name.split("/")[0] for name in (*SIZES, *GOOGLE_ONLY) if name.split("/")[1] == stem}
    if path.suffix != ".npz" or not owners:
        return None
    return "imagenet21k" if "imagenet21k" in owners else min(owners) if len(owners) == 1 else None


def upstreams(upstream: str) -> tuple[str, ...]:
    """What the sources call it, best match first; what ends in `*` is a beginning."""
    if (folder := family(upstream)) != "augreg":
        words = FAMILIES.get(folder, upstream)
        return (words, f"{words} (*") if words == "JFT-300M" else (words,)
    if upstream == "augreg":  # one of many files: the 300 epochs of ImageNet-21k that Google recommends come first
        base = AUGREG_BASES["i21k"]
        return base, f"{base} (*", BY_V2, AUGREG_BASES["i21k_30"], AUGREG_BASES["i1k"]
    stem = PurePath(upstream).name.removesuffix(".npz")
    if "--" in stem:
        return ()
    kind, aug, *rates = re.search(r"-(i1k|i21k|i21k_30)-\d+ep-.*-aug_(\w+)-wd_([\d.]+)-do_([\d.]+)-sd_([\d.]+)",
                                  stem).groups()
    wd, do, sd = (f"{float(rate):g}" for rate in rates)
    base = AUGREG_BASES[kind]
    return f"{base} ({aug} wd{wd} do{do} sd{sd})", base, *((BY_V2,) if stem == V2_FILE else ())


def rank(upstream: str | None, starts: Sequence[str]) -> int | None:
    """The place in `upstreams`; None: another start."""
    return next((i for i, words in enumerate(starts) if upstream == words or (
        words.endswith("*") and (upstream or "").startswith(words[:-1]))), None)
