"""What of ours would count as the same as a published number (`utils/records.py`), and what may have gone wrong where
it is another: `judge`, `causes`."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import isfinite, sqrt

from models.configs import CONFIGS
from models.published import FOLDERS
from utils.records import (
    BY_V2,
    DATASETS,
    PROTOCOLS,
    STEINER,
    Record,
    family,
    find,
    rank,
    records,
    upstreams,
    why_not,
    withheld,
)

__all__ = ["PROTOCOLS", "Record", "Verdict", "causes", "deviations", "find", "judge", "rates", "recipe", "records",
           "tolerance", "why_not", "withheld"]

EDGE = 1e-9  # points: what rounding in float64 may move a difference that lies on the edge of its band


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
    if record.upstream == BY_V2:
        said += (" That theirs started from our file is concluded from timm, which measures 87.10 of the file that "
                 "Google made of ours.")
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
    others = []
    for name, value in recipe(record).items():
        choices = value if isinstance(value, tuple) else (value,)
        if name in s and name not in skipped and s[name] not in choices:
            others.append(f"--{name} was {s[name]}; theirs {' or '.join(map(str, choices))}{remarks.get(name, '')}.")
    decisive = [words for words in others if words.startswith(("--train ", "--optimizer "))]
    return [*_start_differs(record, s), *_size_differs(record, s), *decisive, *_rate_differs(record, s),
            *(words for words in others if words not in decisive)]


def recipe(record: Record) -> dict[str, str | float | bool | tuple]:
    """What is known of the run behind a number, by train.py's flags; what moves the result most comes first. A tuple
    holds what was chosen from.

    Sources: the paper's B.1.1 and Table 4, vit_jax/configs, ViT-pytorch's script, Tables 4 and 5 of Steiner et al.
    Where they are silent, vit_jax's way stands for them: the paper's smallest crop, the held-out share of `short`.
    """
    p, note = record.protocol, record.note or ""
    warmup = re.search(r"warm-up (\d+)", note)
    kept_back = 0.01 if record.dataset.startswith("ImageNet") else 0.02
    steps = (500, 2500) if record.source == f"{STEINER} 5" else record.steps
    known = {
        "train": "all", "optimizer": "sgd", "num_steps": steps,
        "warmup_steps": int(warmup[1]) if warmup else {"vit_jax": 500, "ViT-pytorch": 500}.get(p),
        "val_fraction": {"paper": 0.0, "ViT-pytorch": 0.0, "vit_jax": kept_back, "short": kept_back}.get(p),
        "early_stopping": 0, "in_chans": 3, "decay_type": "cosine", "no_flip": p == "ViT-pytorch",
        "min_area": None if "resmall_crop" in note else 0.05, "mixup": 0.0, "cutmix": 0.0, "randaugment": 0,
        "pad_crop": 0, "label_smoothing": 0.0, "class_weights": "none", "weight_decay": 0.0, "max_grad_norm": 1.0,
        "ema": 0.9999 if "Polyak averaging 0.9999" in note else 0.0, "swa": 0.0, "drop_path": 0.0,
        "dropout": {"ViT-pytorch": 0.1, "augreg": 0.0}.get(p) if record.dropout is None else record.dropout}
    return {name: value for name, value in known.items() if value is not None}


def _start_differs(r: Record, s: Mapping) -> list[str]:
    start = s.get("pretrained_dir")
    if start == "none":
        return [f"The run started from nothing; theirs from {r.upstream}: give --pretrained_dir."]
    if start and family(start) and rank(r.upstream, upstreams(start)) is None:
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
            "augreg": (0.01, 0.03) if imagenet else (0.001, 0.003, 0.01, 0.03),  # Table 4; Table 5's own
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
