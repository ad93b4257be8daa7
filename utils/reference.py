"""Published numbers, and what of ours would count as the same.

The numbers are `bench/published.json`: a line each, every one read in the source that it names (those known from memory
alone were left out, and with them the constant field `status`). A protocol is what one source did; numbers of two are
never compared. What may have gone wrong where ours is another number is in `causes`.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import isfinite, sqrt
from pathlib import Path, PurePath
from typing import NamedTuple

from models.configs import CONFIGS
from models.published import AUGREG, FOLDERS

FILE = Path(__file__).resolve().parent.parent / "bench" / "published.json"
EDGE = 1e-9  # points: what rounding in float64 may move a difference that lies on the edge of its band

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
PROTOCOLS = {
    "paper": Protocol((f"{PAPER} 2", f"{PAPER} 5 (appendix C)", f"{PAPER} 6 (appendix C)"), 384,
                      "learning rate chosen on a held-out part, then all of train, 384 px (ImageNet in Table 2: 512 px "
                      "and averaged weights)"),
    "vit_jax": Protocol((f"{GOOGLE} replication table",), 384,
                        "98 % of train (ImageNet 99 %), fixed learning rates, dropout 0 or 0.1, 384 px"),
    "augreg": Protocol((f"{STEINER} 3", f"{STEINER} 5", f"{GOOGLE} AugReg recommended checkpoints"), 384,
                       "steps and learning rate chosen on a held-out part, AugReg files"),
    "short": Protocol((f"{GOOGLE} short-schedule table",), 384,
                      "500 or 1,000 steps; the resolution is not stated, its times are those of 384 px"),
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
    way = _protocol(protocol)
    names, sets, starts = MODELS.get(model, (model,)), DATASETS.get(dataset, (dataset,)), _upstreams(upstream)
    found = [r for r in records() if r.source in way.sources and r.metric == "top1_pct" and r.model in names
             and r.dataset in sets and _rank(r.upstream, starts) is not None]
    for field, value in (("resolution", resolution), ("steps", steps), ("dropout", dropout)):
        found = [r for r in found if value is None or getattr(r, field) in (value, None)] or found
    resolution = resolution or way.resolution
    if dropout is None:
        dropout = CONFIGS[model].dropout_rate if model in CONFIGS else 0.0
    return sorted(found, key=lambda r: (r.resolution not in (resolution, None), r.dropout not in (dropout, None),
                                        _rank(r.upstream, starts), way.sources.index(r.source)))


def why_not(protocol: str, model: str, upstream: str, dataset: str) -> str | None:
    """Why nobody outside can compare with a cell; None: one can. ValueError: there is no such protocol."""
    found, start = find(protocol, model, upstream, dataset), PurePath(upstream).name.removesuffix(".npz")
    if "jft" in upstream.lower():
        return "Weights pre-trained on JFT-300M were never released: nobody outside Google can reproduce the number."
    if upstream.lower() == "imagenet":
        return "The paper's weights of ImageNet alone were never released; AugReg's (-i1k-) and SAM's are other ones."
    if not found and AUGREG.fullmatch(start) and "--" in start:
        return "The file is already fine-tuned, and the published transfers start from those that are not."
    if not found and protocol == "paper" and model.startswith("R"):
        return ("The paper's hybrids (Table 6) start from JFT-300M, which was never released: compare with Google's "
                "README (vit_jax), or with augreg.")
    return None if found else f"The protocol {protocol} has no number for {model}, {upstream} on {dataset}."


def _protocol(name: str) -> Protocol:
    if name not in PROTOCOLS:
        raise ValueError(f"Nobody published numbers of a protocol '{name}'. Known: {', '.join(PROTOCOLS)}.")
    return PROTOCOLS[name]


def _family(upstream: str) -> str | None:
    """The folder of the bucket that a name or a path is of; None: it is neither."""
    path = PurePath(upstream)
    if AUGREG.fullmatch(path.name.removesuffix(".npz")):
        return "augreg"
    if upstream in (*FOLDERS, *FAMILIES):
        return upstream
    if path.parent.name in FOLDERS:
        return path.parent.name
    return "imagenet21k" if path.suffix == ".npz" else None


def _upstreams(upstream: str) -> tuple[str, ...]:
    """What the sources call it, best match first; what ends in `*` is a beginning."""
    family = _family(upstream)
    if family != "augreg":
        words = FAMILIES.get(family, upstream)
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
    return f"{base} ({aug} wd{wd} do{do} sd{sd})", base, *((BY_V2,) if kind == "i21k" else ())


def _rank(upstream: str | None, starts: Sequence[str]) -> int | None:
    """The place in `_upstreams`; None: another start."""
    return next((i for i, words in enumerate(starts) if upstream == words or (
        words.endswith("*") and (upstream or "").startswith(words[:-1]))), None)


# --- Tolerances ------------------------------------------------------------------------------------------------------

FIVE = 2.326            # d2: the mean range of five normal values in standard deviations (Tippett 1925)
K = {3: 4.30, 5: 2.64}  # two-sided 95 %, of Z / sd of three runs (Student's t, 2 degrees) and Z / (range of five / d2)


@cache
def spread(dataset: str) -> tuple[float, str] | None:
    """(sd of a run in points, source) by big_vision's five runs, whose range is published; None: there are none."""
    for r in records():
        found = re.search(r"range ([\d.]+) to ([\d.]+)", r.note or "")
        if found and r.runs == 5 and r.dataset in DATASETS.get(dataset, (dataset,)):
            low, high = map(float, found.groups())
            return (high - low) / FIVE, f"five runs of {r.model} from {low:.2f} to {high:.2f}, {r.source}"
    return None


@cache
def rounding(source: str) -> float:
    """Points that a printed number may be off: half of the last decimal that its source prints."""
    values = [f"{r.value:.4f}".rstrip("0") for r in records() if r.source == source and r.metric == "top1_pct"]
    return 0.5 * 10.0 ** -max(len(value.partition(".")[2]) for value in values)


def tolerance(dataset: str, record: Record, n: int) -> tuple[float, str] | None:
    """(points, where that is from): how far a mean of n runs of ours may lie from a published number, which is the mean
    of m = `record.runs` runs, if both are runs of one recipe. None: nobody published repeated runs on the data set.

        k * sd * sqrt(1/m + 1/n) + rounding

    The difference of two such means has the standard deviation sd * sqrt(1/m + 1/n): that theirs is mostly a single run
    (m = 1) does not shrink however many seeds we run. sd is the record's own, where it has one (Table 2 of the paper: 3
    runs), else big_vision's range of five runs over d2 = 2.326, of a B/32: the only ones published, so a larger or
    smaller model may scatter less or more. The sd is theirs, never ours: scattered runs must not excuse themselves.

    k covers 95 %: of 40 sound cells, one falls below its band by chance. As an sd of a few runs is vague itself, k is
    not the normal 1.96 but 4.30 for 3 runs (Student's t) and 2.64 for the range of five (Lord's test; both checked by 2
    million draws). Rounding is half of the last printed decimal, and an sd printed as 0.00 is taken for 0.005.

    The pairs that Google's maintainers quoted (B/16: CIFAR-10 98.92 and 99.03, ImageNet 84.61 and 84.62) agree by this
    rule, which does not use them. ValueError: n is less than 1.
    """
    if n < 1:
        raise ValueError(f"A tolerance for a mean of {n} runs: give 1 or more.")
    if record.std is not None and record.runs in K:
        sd, k, source = max(record.std, 0.005), K[record.runs], f"its own {record.runs} runs, {record.source}"
    elif (known := spread(dataset)) is not None:
        (sd, source), k = known, K[5]
    else:
        return None
    rounded = rounding(record.source)
    return (k * sd * sqrt(1 / record.runs + 1 / n) + rounded,
            f"{k:.2f} x {sd:.3f} (sd: {source}) x sqrt(1/{record.runs} + 1/{n}) + {rounded:g} for rounding")


@dataclass(frozen=True)
class Verdict:
    """Numbers in percent and points; None: not known."""

    word: str                 # pass, fail or unknown
    ours: float
    theirs: float | None
    difference: float | None  # ours - theirs
    tolerance: float | None
    source: str               # of their number and of the tolerance; "" without a number
    sentence: str
    record: Record | None = None


def judge(values: Sequence[float], records: Sequence[Record], dataset: str, *, best_on_test: bool = False) -> Verdict:
    """Whether ours, one value in percent a seed, are the first of `records` (best match first, as `find` gives them).

    best_on_test: ours are each the best of many evaluations on the test set. Such are compared with such alone, and
    honest numbers with honest ones. Below the band is a fail. Above it is a pass, as nobody is to be stopped by a
    better result, but the sentence asks what is too good. ValueError: no values, or such as are no percentages.
    """
    if not values or not all(isfinite(v) and 0 <= v <= 100 for v in values):
        raise ValueError(f"Accuracies to compare are {list(values)}; give one or more, in percent.")
    n, ours = len(values), sum(values) / len(values)
    alike = [r for r in records if r.best_on_test == best_on_test]
    if not alike:
        sentence = "There is no published number to compare with."
        if records:
            one, other = ("Ours", "theirs") if best_on_test else ("Theirs", "ours")
            sentence = f"{one} is the best of many evaluations on the test set, {other} not: they cannot be compared."
        return Verdict("unknown", ours, None, None, None, "", sentence)
    record, *others = alike
    difference, band = ours - record.value, tolerance(dataset, record, n)
    said = f"{ours:.2f} (n = {n}) is {abs(difference):.2f} {'below' if difference < 0 else 'above'} {record.value:.2f}"
    if band is None:
        word, said = "unknown", f"{said}; nobody published repeated runs of such a cell, so no tolerance is known."
    elif abs(difference) <= band[0] + EDGE:
        word, said = "pass", f"{said}, within {band[0]:.2f}."
    elif difference < 0:
        word, said = "fail", f"{said}, more than {band[0]:.2f}."
    else:
        word, said = "pass", (f"{said}, more than {band[0]:.2f}, so higher than published: are images of the test part "
                              "in the training part, or was the recipe another one?")
    listed = [f"{r.value:.2f} ({', '.join(filter(None, (r.upstream, re.split('[,;]', r.note or '')[0])))})" for r in
              others if (r.resolution, r.steps) == (record.resolution, record.steps) and r.value != record.value]
    if listed:
        said += f" Also published: {'; '.join(listed)}."
    source = record.source + (f"; tolerance: {band[1]}" if band else "")
    return Verdict(word, ours, record.value, difference, band[0] if band else None, source, said, record)


# --- Causes ----------------------------------------------------------------------------------------------------------

def causes(record: Record, settings: Mapping) -> list[str]:
    """The usual causes of another number than `record`'s, most likely first: what is known to differ, then the rest.
    settings: those of the run by name, as in settings.json, as many as are known."""
    return [*deviations(record, settings), *suspects(record)]


def deviations(record: Record, settings: Mapping) -> list[str]:
    """What the run is known to have done otherwise, what moves the result most first. A pass despite one of these is a
    pass of another recipe."""
    s = {name: value for name, value in settings.items() if value is not None}
    if s.get("model_type") in CONFIGS:
        s.setdefault("dropout", CONFIGS[s["model_type"]].dropout_rate)
    skipped = ("num_steps", "warmup_steps") if s.get("num_epochs") else ()
    remarks = {"optimizer": " with momentum 0.9, whose learning rates are 10 to 100 times Adam's",
               "val_fraction": " (when the learning rate had been chosen)"}
    others = [f"--{name} was {s[name]}; theirs {value}{remarks.get(name, '')}." for name, value in
              recipe(record).items() if name in s and name not in skipped and s[name] != value]
    decisive = [words for words in others if words.startswith(("--train ", "--optimizer "))]
    return [*_start_differs(record, s), *_size_differs(record, s), *decisive, *_rate_differs(record, s),
            *(words for words in others if words not in decisive)]


def recipe(record: Record) -> dict[str, str | float | bool]:
    """What is known of the run behind a number, by train.py's flags; what moves the result most comes first.

    Sources: the paper's B.1.1 and Table 4, vit_jax/configs, ViT-pytorch's script, Table 4 of Steiner et al.
    """
    p, warmup = record.protocol, re.search(r"warm-up (\d+)", record.note or "")
    kept_back = 0.01 if record.dataset.startswith("ImageNet") else 0.02
    known = {
        "train": "all", "optimizer": "sgd", "num_steps": record.steps,
        "warmup_steps": int(warmup[1]) if warmup else {"vit_jax": 500, "ViT-pytorch": 500}.get(p),
        "val_fraction": {"paper": 0.0, "ViT-pytorch": 0.0, "vit_jax": kept_back, "short": kept_back}.get(p),
        "decay_type": "cosine", "no_flip": p == "ViT-pytorch", "mixup": 0.0, "cutmix": 0.0, "randaugment": 0,
        "pad_crop": 0, "label_smoothing": 0.0, "weight_decay": 0.0, "max_grad_norm": 1.0, "drop_path": 0.0,
        "dropout": {"ViT-pytorch": 0.1, "augreg": 0.0}.get(p) if record.dropout is None else record.dropout}
    return {name: value for name, value in known.items() if value is not None}


def _start_differs(r: Record, s: Mapping) -> list[str]:
    start = s.get("pretrained_dir")
    if start == "none":
        return [f"The run started from nothing; theirs from {r.upstream}: give --pretrained_dir."]
    if start and _family(start) and _rank(r.upstream, _upstreams(start)) is None:
        return [f"The run started from {start}; theirs from {r.upstream}: files of one model's name differ."]
    return []


def _size_differs(r: Record, s: Mapping) -> list[str]:
    size = s.get("img_size") or s.get("resolved", {}).get("img_size") or ()
    sides = {size} if isinstance(size, int) else set(size)
    theirs = r.resolution or (384 if r.protocol == "short" else None)
    if not sides or not theirs or sides == {theirs}:
        return []
    return [f"The run was at {' x '.join(map(str, sorted(sides)))} px, theirs at {theirs} px"
            f"{'' if r.resolution else ' (by its times)'}: --img_size {theirs}. On ImageNet that decides (AugReg's "
            "B/16: 83.96 at 224 px, 85.49 at 384 px), on CIFAR it matters less."]


def rates(record: Record) -> tuple[float, ...]:
    """Learning rates at batch 512 that the source used or chose from; (): it does not say."""
    if found := re.search(r"\blr (\d\.\d+)", record.note or ""):
        return (float(found[1]),)
    imagenet = record.dataset.startswith("ImageNet")
    return {"paper": (0.003, 0.01, 0.03, 0.06) if imagenet else (0.001, 0.003, 0.01, 0.03),
            "vit_jax": (0.01,) if (record.model, record.dataset) == ("ViT-B/16", "CIFAR-10") else (0.03,),
            "augreg": (0.01, 0.03) if imagenet else (0.001, 0.003, 0.01, 0.03),
            "ViT-pytorch": (0.03,)}.get(record.protocol, ())


def _rate_differs(r: Record, s: Mapping) -> list[str]:
    rate, batch, theirs, found = s.get("learning_rate"), s.get("train_batch_size") or 512, rates(r), []
    if rate and theirs and s.get("optimizer", "sgd") == "sgd" and not (
            0.99 * min(theirs) <= rate * 512 / batch <= 1.01 * max(theirs)):
        scaled = " or ".join(f"{value * batch / 512:.2g}" for value in theirs)
        found.append(f"The learning rate was {rate:g} at batch {batch}; theirs {' or '.join(f'{v:g}' for v in theirs)} "
                     f"at 512" + (f", in proportion (linear scaling) {scaled} at {batch}." if batch != 512 else "."))
    if batch != 512:
        found.append(f"The batch was {batch}; theirs 512: --train_batch_size 512 takes no more memory, as it is split.")
    return found


def suspects(record: Record) -> list[str]:
    """What no setting tells."""
    pixels = {"paper": '"as in BiT", says the paper', "big_vision": "384 px cut out of the middle of 448"}.get(
        record.protocol, "test images squashed to the square by bilinear interpolation, nothing cut away")
    found = [
        f"Which file: theirs started from {record.upstream}. Files of one name are in {', '.join(FOLDERS)}; an AugReg "
        "model alone is many, of which timm's are partly others than those that Google recommends.",
        f"Which protocol: {PROTOCOLS[record.protocol].about}." if record.protocol else "Which protocol: its own.",
        "GELU: Google's weights expect the tanh form and a norm epsilon of 1e-6; PyTorch's defaults are erf and 1e-5.",
        f"Pixels: values in [-1, 1], {pixels}."]
    if record.protocol in ("vit_jax", "short") and record.dataset.startswith("CIFAR"):
        found.append("Images that count: Google's loop drops the last batch, so theirs is scored on 9,728 of 10,000.")
    if record.dataset.startswith("ImageNet") and "21k" in (record.upstream or ""):
        found.append("Choosing on a part of ImageNet's train is biased: the 21k pre-training has seen it.")
    return found
