"""The folder of a run, read when it is over: settings, curves, the header of its weights, predictions.

A report has to be had of a run that was cut off, too: what is missing or damaged is a sentence, and the rest is read.
"""

import csv
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from models import exchange
from utils.runs import weights_of

SAME = 1e-9  # two accuracies of the same images differ by less


class Series(NamedTuple):
    """All values of one name in metrics.jsonl, in the order of its lines."""
    steps: np.ndarray   # (N,) int64
    values: np.ndarray  # (N,) float64, NaN where a value was not finite


class Predictions(NamedTuple):
    """What the weights said about N images of the test set, with C classes."""
    classes: tuple[str, ...]
    images: list[str]          # each one's file; of a set in memory its number in the test split
    labels: Tensor             # (N,) int64; with several labels an image (N, C) int64 of 0 and 1
    predicted: Tensor          # likewise
    confidence: Tensor | None  # (N,) float64, the largest probability; None with several labels

    @property
    def right(self) -> Tensor:
        """(N,) bool: the class, or each of the labels."""
        same = self.labels == self.predicted
        return same.all(dim=1) if same.ndim == 2 else same


@dataclass(frozen=True)
class History:
    folder: Path
    settings: dict                   # as given, with the keys of settings.json; {} where none could be read
    series: dict[str, Series]        # by name: train/loss, test/accuracy ...
    seconds: float                   # from the first line of metrics.jsonl to the last, pauses left out
    ended: float | None              # when the last line was written, in seconds since 1970
    weights: Path | None             # the file that `weights_of` chooses; None: there is none, or it is damaged
    about: dict                      # its header
    predictions: Predictions | None
    problems: tuple[str, ...]        # what is missing or damaged, a sentence each

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def resolved(self) -> dict:
        return self.settings.get("resolved") or {}

    @property
    def multi_label(self) -> bool:
        return self.about.get("multi_label") is True

    @property
    def part(self) -> str:
        """On which the evaluations on the way were made, and `best` was chosen."""
        return "val" if any(name.startswith("val/") for name in self.series) else "test"

    @property
    def step(self) -> int:
        """Of the last update."""
        steps = self.series["train/loss"].steps if "train/loss" in self.series else ()
        return int(max(steps, default=0))

    @property
    def ended_as_planned(self) -> bool:
        """Whether it came to its last step, or stopped early as it was told to, and was scored there."""
        return "best/test_accuracy" in self.series and (
            self.step >= self.settings.get("num_steps", 0) or bool(self.settings.get("early_stopping")))

    @property
    def score(self) -> tuple[str, float, str] | None:
        """(metric, value, part) that the header of the weights tells: ("accuracy", 0.97, "test"); None: nothing."""
        metric = "map" if self.multi_label else "accuracy"
        scores = self.about.get(metric) or {}
        part = "test" if "test" in scores else next(iter(scores), None)
        return None if part is None or scores[part] is None else (metric, scores[part], part)

    @property
    def throughput(self) -> float | None:
        """Images a second while it trained, the median."""
        if "train/images_per_second" not in self.series:
            return None
        speeds = self.series["train/images_per_second"].values
        return float(np.nanmedian(speeds)) if np.isfinite(speeds).any() else None


def read(folder: Path) -> History:
    """ValueError: there is no run. What else is wrong becomes `problems`."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file; a report is of the folder of a run." if folder.exists() else
                         f"There is no run at {folder}.")
    if not any((folder / name).is_file() for name in ("settings.json", "metrics.jsonl")):
        runs = sorted(file.parent for file in folder.glob("*/settings.json"))
        hint = f" It holds some: give one of them, such as {runs[-1]}, or several." if runs else ""
        raise ValueError(f"{folder} is no run: it has neither settings.json nor metrics.jsonl.{hint}")
    problems: list[str] = []

    def attempt(part: Callable, *arguments, otherwise):
        try:
            return part(*arguments)
        except (ValueError, OSError) as error:
            problems.append(f"{Path(error.filename).name} cannot be read ({error.strerror})."
                            if isinstance(error, OSError) and error.filename else str(error))
            return otherwise
    settings = attempt(_settings, folder / "settings.json", otherwise={})
    rows = attempt(_rows, folder / "metrics.jsonl", problems, otherwise=[])
    weights, about = attempt(_weights, folder, otherwise=(None, {}))
    settings = settings or about.get("settings") or {}
    predictions = attempt(_predictions, folder / "predictions.csv", about, otherwise=None)
    return History(folder, settings, _series(rows), _seconds(rows, settings), rows[-1][3] if rows else None, weights,
                   about, predictions, tuple(problems))


def _settings(file: Path) -> dict:
    """What settings.json holds. ValueError: it is missing or damaged."""
    if not file.exists():
        raise ValueError("settings.json is missing: settings are those that the weights tell, if they do.")
    damaged = "settings.json is damaged: settings are those that the weights tell, if they do."
    try:
        found = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(damaged) from error
    if not isinstance(found, dict) or not isinstance(found.get("resolved", {}), dict):
        raise ValueError(damaged)
    return found


def _rows(file: Path, problems: list[str]) -> list[tuple[str, int, float, float]]:
    """(name, step, value, time) of each sound line; others are counted in `problems`."""
    if not file.exists():
        raise ValueError("metrics.jsonl is missing: there are no curves.")
    rows, damaged = [], 0
    for line in file.read_bytes().splitlines():
        try:
            event = json.loads(line)
            value = math.nan if event["value"] is None else float(event["value"])
            rows.append((str(event["name"]), int(event["step"]), value, float(event["time"])))
        except (ValueError, TypeError, KeyError, OverflowError):
            damaged += 1
    if damaged:
        lines = "1 line of metrics.jsonl is" if damaged == 1 else f"{damaged:,} lines of metrics.jsonl are"
        problems.append(f"{lines} damaged (a crash cuts the last one off) and left out.")
    if not rows:
        problems.append("metrics.jsonl has no values: the run has made no update.")
    return rows


def _series(rows: list[tuple]) -> dict[str, Series]:
    columns: dict[str, tuple[list, list]] = {}
    for name, step, value, _ in rows:
        steps, values = columns.setdefault(name, ([], []))
        steps.append(step)
        values.append(value if math.isfinite(value) else math.nan)
    return {name: Series(np.array(steps), np.array(values)) for name, (steps, values) in columns.items()}


def _seconds(rows: list[tuple], settings: dict) -> float:
    """Between the lines; not from the last line before a process ended to the first of the one that continued."""
    times = np.array([row[3] for row in rows])
    gaps = np.diff(times).clip(min=0)
    for continued in settings.get("continued") or ():
        at = continued.get("time", 0)  # none in older runs
        gaps[(times[:-1] <= at) & (at < times[1:])] = 0
    return float(gaps.sum())


def _weights(folder: Path) -> tuple[Path, dict]:
    """The weights that a person would take, and their header. ValueError: none, or damaged."""
    path = weights_of(folder)
    path = path if path != folder else folder / "last.safetensors"  # without settings.json it is no run to others
    if not path.is_file():
        raise ValueError("There are no weights.")
    return path, exchange.read_metadata(path)


def _predictions(file: Path, about: dict) -> Predictions:
    """Those that the run left. ValueError: none, damaged, or of other weights than `about` describes."""
    if not file.exists():
        raise ValueError("predictions.csv is missing (a run writes it at its end): there is nothing to tell of single "
                         "classes and images.")
    damaged = "predictions.csv is damaged: there is nothing to tell of single classes and images."
    try:
        with open(file, encoding="utf-8", errors="surrogateescape", newline="") as text:
            rows = list(csv.DictReader(text, strict=True))
        several = "confidence" not in rows[0]
        texts = {row[column] for row in rows for column in ("label", "predicted")}
        names = sorted({name for text in texts for name in text.split("|")} - {""} if several else texts)
        classes = tuple(map(str, about.get("classes") or names))
        number = {name: i for i, name in enumerate(classes)}
        labels, predicted = (_numbers([row[column] for row in rows], number, several)
                             for column in ("label", "predicted"))
        confidence = None if several else torch.tensor([float(row["confidence"]) for row in rows], dtype=torch.double)
        if not several and not confidence.isfinite().all():
            raise ValueError(damaged)
        found = Predictions(classes, [row["image"] for row in rows], labels, predicted, confidence)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, csv.Error) as error:
        raise ValueError(damaged) from error
    told = (about.get("accuracy") or {}).get("test")
    if told is not None and abs(told - found.right.double().mean().item()) > SAME:
        raise ValueError("predictions.csv describes other weights than those of the last evaluation (the run has gone "
                         "on since, and writes it at its end): it is left out.")
    return found


def _numbers(texts: Sequence[str], number: dict[str, int], several: bool) -> Tensor:
    """Names of classes -> (N,) their numbers, or (N, C) of 0 and 1. KeyError: a name that is no class."""
    if not several:
        return torch.tensor([number[text] for text in texts])
    table = np.zeros((len(texts), len(number)), dtype=np.int64)
    for row, text in zip(table, texts):
        for name in text.split("|") if text else ():
            row[number[name]] = 1
    return torch.from_numpy(table)
