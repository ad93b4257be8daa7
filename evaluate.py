"""How good is a model, and where is it wrong: `python evaluate.py output/NAME`, or `CHECKPOINT --dataset DIR`.

Every image of the test part counts once, in float32, squashed to the model's size as in the evaluations of a run.
"""

import json
import logging
import re
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from models.published import imagenet_classes
from utils import data
from utils.batches import EvalBatches
from utils.commands import add_shared, check_free, opened, run
from utils.data import Data, Split
from utils.device import choose_device
from utils.evaluation import Outputs, report, stream
from utils.runs import data_of
from utils.settings import Parser
from utils.tables import as_text, some, write_rows
from utils.trained import Trained, open_trained

log = logging.getLogger("evaluate")

WNID = re.compile(r"n\d{8}")                      # a class of ImageNet, as its folders are called
NUMBER = re.compile(r"ILSVRC2012_val_(\d{8})\b")  # an image of ImageNet's validation part
PARTS = ("test", "val", "train", "all")


# --- Data ------------------------------------------------------------------------------------------------------------

def load_data(args, trained: Trained) -> Data:
    """What --dataset and --labels name, else what the run was trained on; parts that must be drawn are drawn as then.

    Paths come from the command line or from the run's own settings.json, never out of a weights file.
    """
    dataset, labels = args.dataset, args.labels
    stored = _settings(Path(args.checkpoint), needed=not dataset and not labels)
    if not dataset and not labels:
        if not stored:
            folder = Path(args.checkpoint).parent
            hint = f", or give the folder of its run, {folder}" if (folder / "settings.json").is_file() else ""
            raise ValueError(f"{args.checkpoint} does not lead to any images: say which, with --dataset{hint}.")
        dataset, labels = stored["dataset"], stored["labels"]
        for path in ([dataset] if dataset not in data.NAMED else []) + ([labels] if labels else []):
            if not Path(path).exists():
                raise ValueError(f"{args.checkpoint} was trained on {path}, which is not there: say with "
                                 f"--dataset{' and --labels' * bool(labels)} where it is.")
    drawn = stored or trained.about.get("settings") or {}
    return data.load(dataset or str(Path(labels).parent), data_dir=args.data_dir or stored.get("data_dir") or "data",
                     labels=labels, val_fraction=drawn.get("val_fraction", 0.0), seed=drawn.get("seed", 42),
                     in_chans=trained.model.config.in_chans)


def _settings(folder: Path, needed: bool) -> dict:
    """Those of a run's folder; {} for anything else. ValueError: they are needed, and damaged."""
    file = folder / "settings.json"
    if not file.is_file():
        return {}
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(settings["dataset"], str):
            return settings | data_of(settings, settings.get("where", {}))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        log.debug("%s: %s", file, error)
    if needed:
        raise ValueError(f"{file} is damaged: say which images, with --dataset.")
    return {}


def part_of(dataset: Data, name: str) -> Split:
    """One part, or all of them as one. ValueError: it has no such part."""
    parts = {"train": dataset.train, "val": dataset.val, "test": dataset.test}
    if name != "all":
        if parts[name] is None:
            raise ValueError(f"{dataset.name} has no part held out beside {dataset.test_name}, which is scored with "
                             "--split test.")
        return parts[name]
    splits = [split for split in parts.values() if split is not None]
    images = [image for split in splits for image in split.images]
    return replace(splits[0], images=torch.stack(images) if isinstance(splits[0].images, torch.Tensor) else images,
                   labels=torch.cat([split.labels for split in splits]))


def match(split: Split, trained: Trained, name: str) -> tuple[Split, list[int]]:
    """The split with labels as the model numbers its classes, and the numbers of those that the data set has.

    Classes are matched by name; ValueError: the model lacks one, or the names cannot be compared.
    """
    C, ours, theirs = trained.model.num_classes, split.classes, trained.classes
    if split.multi_label != trained.multi_label:
        has, gives = ("one class", "several") if split.multi_label else ("several classes", "one")
        raise ValueError(f"{trained.path} was trained for {has} an image, and the labels of {name} give {gives}.")
    order = list(range(len(ours)))
    if theirs is None or (len(ours) == len(theirs) == 1000 and _are_wnids(ours) and not _are_wnids(theirs)):
        if len(ours) != C:
            raise ValueError(f"{trained.path} has {C:,} classes without names, and {name} has {len(ours):,}: which is "
                             "which cannot be told.")
        log.info("%s: classes are matched by their sorted order.", "The model's have names, the data's WordNet ids"
                 if theirs else "The file does not name its classes")
        theirs = theirs or tuple(sorted(ours))
        order = torch.tensor(sorted(order, key=ours.__getitem__)).argsort().tolist()
    elif theirs != ours:
        place = {known: i for i, known in enumerate(theirs)}
        if len(place) < C:
            raise ValueError(f"{trained.path} gives one name to two classes: they cannot be matched with {name}.")
        if lacking := [known for known in ours if known not in place]:
            hint = ", and WordNet ids can be matched with them only if all 1,000 are there" * _are_wnids(lacking)
            raise ValueError(f"{name} has classes that the model lacks: {some(lacking)}. The model's are "
                             f"{some(theirs)}{hint}.")
        order = [place[known] for known in ours]
        log.info("%s", "The model has the same classes in another order: matched by name." if len(ours) == C else
                 f"The data has {len(ours):,} of the model's {C:,} classes: matched by name.")
    if split.multi_label:
        labels = torch.zeros(len(split), C)
        labels[:, order] = split.labels
    else:
        labels = torch.tensor(order)[split.labels]
    return replace(split, labels=labels, classes=tuple(theirs)), order


def _are_wnids(names) -> bool:
    return all(map(WNID.fullmatch, names))


# --- ImageNet ReaL ---------------------------------------------------------------------------------------------------

def real_labels(path: str, split: Split, trained: Trained) -> list[list[int]]:
    """The reassessed labels of the split's images (Beyer et al. 2020): class numbers, none or several an image.

    The file is a list in the order of ImageNet's validation images, whose numbers are in their names. ValueError: it
    is something else, an image has no number, or the model's classes are not ImageNet's 1,000.
    """
    names = trained.classes or ()
    alike = sum(theirs.split(",")[0] == ours for theirs, ours in zip(names, imagenet_classes()))
    if trained.model.num_classes != 1000 or (names and not _are_wnids(names) and alike < 500):
        raise ValueError(f"--real_labels is for ImageNet's 1,000 classes in their usual order; {trained.path} has "
                         f"{trained.model.num_classes:,}{f' ({some(names, 3)})' if names else ''}.")
    try:
        table = json.loads(Path(path).read_text(encoding="utf-8"))
        known = all(type(label) is int and 0 <= label < 1000 for labels in table for label in labels)
    except (ValueError, TypeError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no JSON list of lists"
        raise ValueError(f"{path} cannot be read as ReaL labels: {reason}.") from error
    if not known:
        raise ValueError(f"{path} cannot be read as ReaL labels: expected lists of class numbers, 0 to 999.")
    images = split.images if isinstance(split.images, list) else []
    numbers = [NUMBER.search(Path(image).name) for image in images]
    if not images or None in numbers:
        example = images[numbers.index(None)] if images else "an image in memory"
        raise ValueError(f"--real_labels finds an image's labels by its name, ILSVRC2012_val_00000001.JPEG; found "
                         f"{example}.")
    numbers = [int(number[1]) for number in numbers]
    if not 1 <= min(numbers) <= max(numbers) <= len(table):
        raise ValueError(f"{path} has labels for {len(table):,} images; there is one with the number {max(numbers):,}.")
    return [table[number - 1] for number in numbers]


def real_accuracy(said: Outputs, labels: list[list[int]]) -> dict:
    """The share of images, of those that have labels, whose predicted class is one of them."""
    pairs = zip(said.indices.tolist(), said.predicted.tolist())
    right = [predicted in labels[i] for i, predicted in pairs if labels[i]]
    return {"real_accuracy": sum(right) / len(right) if right else None, "real_images": len(right)}


# --- Output ----------------------------------------------------------------------------------------------------------

def write_report(file, found: dict) -> None:
    """JSON, a line for each part of the report."""
    lines = [f"{json.dumps(name)}: {json.dumps(value, allow_nan=False)}" for name, value in found.items()]
    file.write("{" + ",\n ".join(lines) + "}\n")


def ask(trained: Trained, batches: EvalBatches) -> tuple[Outputs, float]:
    """(what the model says, images a second, decoding included). ValueError: nothing to count, or no numbers."""
    started, parts = time.perf_counter(), []
    with tqdm(total=len(batches.split), unit=" images", disable=None, leave=False, dynamic_ncols=True) as bar:
        for part in stream(trained.model, batches, scores=trained.multi_label):
            parts.append(part)
            bar.update(len(part.indices))
    said = Outputs.cat(parts)
    seconds = time.perf_counter() - started
    if not len(said.indices):
        raise ValueError(f"None of the {len(batches.split):,} images could be read.")
    if not said.loss.isfinite().all():
        raise ValueError(f"{trained.path} computes numbers that are not finite: the weights are of no use.")
    return said, len(said.indices) / seconds


def evaluate(args) -> int:
    """From the arguments to the report; the exit code."""
    check_free(args.output, args.overwrite)
    kind = Path(args.output).suffix if args.output else None
    if kind not in (None, ".json", ".csv"):
        raise ValueError(f"--output {args.output}: .json takes the whole report, .csv a line an image.")
    device = choose_device(args.device)
    trained = open_trained(args.checkpoint, device, weights=args.weights, img_size=args.img_size,
                           model_type=args.model_type)
    dataset = load_data(args, trained)
    split, known = match(part_of(dataset, args.split), trained, dataset.name)
    real = real_labels(args.real_labels, split, trained) if args.real_labels else None
    said, speed = ask(trained, trained.batches(split, device, args.batch_size, args.num_workers))
    read = set(said.indices.tolist())
    skipped = [split.name(i) for i in range(len(split)) if i not in read]
    part = f"{args.split} ({dataset.test_name})" if args.split == "test" else args.split
    found = {"model": str(trained), "data": f"{dataset.name}, {part}", "images_per_second": speed,
             "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
             **report(said, split.classes, known), **(real_accuracy(said, real) if real else {}), "skipped": skipped}
    if args.output:  # before the report, whose reader (`| head`) may leave
        with opened(args.output) as file:
            write_rows(file, split, said) if kind == ".csv" else write_report(file, found)
        log.info("%s is written.", args.output)
    print(as_text(found))
    if skipped:
        log.warning("%d of %d images could not be read and are not counted.", len(skipped), len(split))
    return int(bool(skipped))


def parser() -> Parser:
    p = Parser(prog="evaluate.py", allow_abbrev=False, description=__doc__.split("\n")[0])
    add_shared(p)
    p.add_argument("--dataset", metavar="NAME|DIR", help="as for train.py (default: what the run was trained on)")
    p.add_argument("--labels", metavar="FILE.csv", help="as for train.py")
    p.add_argument("--data_dir", metavar="DIR", help="where named sets are kept (default: the run's, or data)")
    p.add_argument("--split", choices=PARTS, default="test", help="the part that is scored (default: test)")
    p.add_argument("--real_labels", metavar="real.json", help="ImageNet ReaL: score against these labels, too")
    p.add_argument("--output", metavar="FILE", help=".json: the whole report; .csv: a line an image")
    return p


def main(argv: list[str] | None = None) -> None:
    """The command line; exit code 1 where images were skipped, 2 for an error of one sentence."""
    run(evaluate, parser().parse_args(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    main()
