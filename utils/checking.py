"""A finished run beside the published numbers: `check(output/NAME)`."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from models.published import SAME_WEIGHTS
from utils import comparison, history, reference
from utils.data import NAMED
from utils.history import History
from utils.records import DATASETS, family

ANY = ("imagenet21k", "augreg", "imagenet21k+imagenet2012")  # starts that a run from nothing is shown the numbers of


def check(folder: Path) -> list[comparison.Row]:
    """The run beside all published numbers of its model and data, those that were made most like it first.

    [] : nobody published one. ValueError: no run, one that has not ended or that has nothing to compare, or images that
    are not the published set's.
    """
    found = history.read(folder)
    if "test" not in (found.about.get("accuracy") or {}):
        raise ValueError(f"{folder} has not ended: python train.py --resume {folder}")
    if "test/accuracy" not in found.series or found.multi_label:
        raise ValueError(f"{folder} has no accuracy to compare: nobody published one for several labels an image.")
    model, settings = _model(found), _settings(found)
    dataset, start = _dataset(found), published_start(found, model)
    settings["pretrained_dir"] = start
    lines = []
    for protocol in reference.PROTOCOLS:
        row, others = _beside(found, settings, protocol, (model, start, dataset))
        if row:
            lines.append((row.word == "unknown", others, row))
    return [row for *_, row in sorted(lines, key=lambda line: line[:2])]


def judged(ours: comparison.Row, values: list[float], records: list[reference.Record], settings: Mapping,
           why_not: str | None = None) -> comparison.Row:
    """`ours` with the verdict, and with the usual causes where it is a fail."""
    verdict = reference.judge(values, records, ours.dataset, best_on_test=ours.best_on_test)
    causes = reference.causes(verdict.record, settings) if verdict.word == "fail" else ()
    return replace(ours, theirs=verdict.theirs, difference=verdict.difference, tolerance=verdict.tolerance,
                   word=verdict.word, source=verdict.source, note=why_not or verdict.sentence, causes=tuple(causes))


def _beside(found: History, settings: dict, protocol: str, cell: tuple[str, str, str]) -> tuple:
    """(the run beside the numbers of a protocol, or None where it has none; how many settings were others)."""
    model, start, dataset = cell
    size, tests = settings["img_size"][0], found.series["test/accuracy"].values
    records, reason = [], None
    for upstream in ANY if start == "none" else (start,):
        if records := reference.find(protocol, model, upstream, dataset, size, found.settings["num_steps"],
                                     settings.get("dropout")):
            break
        reason = reason or reference.withheld(protocol, model, upstream, dataset, size)
    if not records and not reason:
        return None, 0
    # Only where the test set was looked at on the way is the best of its values what such a source reports.
    looked = found.part == "test" and len(tests) > 1
    best = looked and any(record.best_on_test for record in records)
    value = 100 * float(tests.max() if best else tests[-1])
    row = comparison.Row(protocol, model, start, dataset, size, settings["num_steps"], settings["learning_rate"], value,
                         None, 1, minutes=found.seconds / 60, best_on_test=best)
    row = judged(row, [value], records, settings, why_not=reason if not records else None)
    others = reference.deviations(records[0], settings) if records else []
    if others and row.word == "pass":
        row = replace(row, note=f"{row.note} It was another recipe, though: {' '.join(others)}")
    return row, len(others)


def _model(found: History) -> str:
    """ValueError: the header does not say."""
    name = (found.about.get("config") or {}).get("name")
    if not name:
        raise ValueError(f"{found.weights} does not name its model: its header has no config. Write the weights anew "
                         "with python convert.py.")
    return name


def _settings(found: History) -> dict:
    """By name, as they were resolved; `num_steps` are those that were made. ValueError: settings are missing."""
    given = {name: value for name, value in found.settings.items() if value not in (None, "auto")}
    settings = {**found.resolved, **given}
    settings["img_size"] = found.about.get("img_size") or settings.get("img_size")
    missing = [name for name in ("dataset", "num_steps", "learning_rate", "img_size") if not settings.get(name)]
    if missing:
        raise ValueError(f"Neither settings.json nor the weights of {found.folder} tell {', '.join(missing)}.")
    settings["num_steps"] = int(found.series["test/accuracy"].steps[-1])
    settings["num_epochs"] = 0.0  # they are counted in `num_steps`
    return settings


def _dataset(found: History) -> str:
    """The name of the set. ValueError: a folder has the name of a published set but not as many images."""
    given = str(found.settings["dataset"])
    name, named = Path(given).name, NAMED.get(Path(given).name)
    if (given in NAMED and not found.settings.get("labels")) or name not in DATASETS or not named:
        return name
    if found.predictions is not None:
        count, expected, slack, part = len(found.predictions.labels), named.test_images, 0, "test"
    else:  # what is left when a share of each class was held out
        count, part = found.resolved.get("train_images"), "training"
        held = found.settings.get("val_fraction") or 0.0
        expected, slack = round(named.train_images * (1 - held)), named.classes if held else 0
    if count is None:
        raise ValueError(f"Whether the folder {given} is the published set cannot be told: predictions.csv is missing, "
                         "and the settings do not tell how many images there were.")
    if abs(count - expected) > slack:
        raise ValueError(f"The folder {given} is not the published set: {count:,} {part} images, where {name} has "
                         f"{expected:,}.")
    return name


def published_start(found: History, model: str) -> str:
    """What the run started from, as `reference.find` takes it: Google's file also where it was a copy that timm or
    Hugging Face has; "none": nothing; what is no published file, as it was given."""
    given = found.settings.get("pretrained_dir") or found.resolved.get("pretrained_dir")
    if given == "none":
        return "none"
    start, told = given or f"checkpoint/{model}.npz", (found.about.get("finetuned_from") or {}).get("name", "")
    if family(start):
        return start
    parts = {part.removesuffix(".safetensors").removesuffix(".bin") for part in (*Path(start).parts, *Path(told).parts)}
    for name, copies in SAME_WEIGHTS.items():
        for copy in copies:
            if parts & {copy.split("/")[1], copy.replace("/", "--"), f"models--{copy.replace('/', '--')}"}:
                return f"checkpoint/{name}.npz"
    return told if family(told) else start
