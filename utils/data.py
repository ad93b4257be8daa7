"""A named set or a folder of images -> `Data`: labelled splits, and how a training image is looked at."""

import difflib
import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from utils import sets
from utils.images import SUFFIXES, suffix_of
from utils.labels import PARTS, check_file, read_labels

log = logging.getLogger(__name__)

NOTES = {".txt", ".csv", ".tsv", ".json", ".md", ".db", ".ini"}  # usual beside images: no word
LAYOUT = "DIR/train/CLASS/*.jpg with DIR/test/CLASS/* or DIR/val/CLASS/* beside it, or DIR/CLASS/*.jpg"
HELD_OUT = 0.2  # the share of train that becomes the test part where a folder has none
DIGITS_SEED = 0  # the test part of digits is the same in every run


@dataclass(frozen=True)
class Split:
    """N labelled images, decoded or still files."""

    images: Tensor | list[Path]  # (N, channels, H, W) uint8, or the files, still to be decoded
    labels: Tensor  # (N,) int64, or (N, C) float32 of 0 and 1 where an image may have several
    classes: tuple[str, ...]
    channels: int = 3  # that files are decoded to
    files: list[Path] | None = None  # that decoded images came from

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def multi_label(self) -> bool:
        return self.labels.ndim == 2

    def name(self, i: int) -> str:
        """The file of image i; its number, where there is none."""
        files = self.files or self.images
        return str(files[i]) if isinstance(files, list) else str(i)

    def subset(self, indices) -> "Split":
        """The images at these positions, in this order."""
        indices = torch.as_tensor(indices, dtype=torch.int64)
        images = self.images
        images = images[indices] if isinstance(images, Tensor) else [images[i] for i in indices.tolist()]
        files = self.files and [self.files[i] for i in indices.tolist()]
        return replace(self, images=images, labels=self.labels[indices], files=files)


@dataclass(frozen=True)
class View:
    """How a training image is looked at: Google's random box takes `min_area` to 100 % of the area."""

    min_area: float = 0.05
    flip: bool = True
    pad_crop: int = 0      # pixels around the whole image, out of which its size is cut; instead of the box
    randaugment: int = 0   # operations on each image
    magnitude: int = 9     # of these, 0 to 30
    mixup: float = 0.0     # alpha; 0: never
    cutmix: float = 0.0


@dataclass(frozen=True)
class Data:
    name: str
    train: Split
    val: Split | None  # selects `best`; None: nothing held out
    test: Split  # scored at the end
    view: View
    test_name: str  # what the scored part is, in words for the log

    def fingerprint(self) -> str:
        """sha256 (hex) over classes, parts, labels and images: equal for the same data in another folder.

        Images in memory count with their bytes, files with their size and their name below the folder that all have in
        common: quick, but a file that changed at the same size goes unnoticed.
        """
        parts = {name: split for name in ("train", "val", "test") if (split := getattr(self, name)) is not None}
        files = {name: [os.path.abspath(file) for file in split.images] for name, split in parts.items()
                 if not isinstance(split.images, Tensor)}
        start = len(os.path.commonpath([file for part in files.values() for file in part])) if files else 0
        digest = hashlib.sha256()
        for name, split in parts.items():
            images = split.images
            below = [(file[start:].replace(os.sep, "/"), os.path.getsize(file)) for file in files.get(name, ())]
            about = [name, split.classes, split.labels.shape, below or [str(images.dtype), images.shape]]
            digest.update(json.dumps(about).encode())
            for tensor in [split.labels] if below else [split.labels, images]:
                digest.update(tensor.cpu().contiguous().numpy().data)
        return digest.hexdigest()


@dataclass(frozen=True)
class NamedSet:
    """What is known of a set before it is there, and how the papers fine-tune on it (None: they do not).

    The papers choose the learning rate on `held_out` of train, then train on all of it. Theirs is the end of train in
    TFDS's order, ours a stratified draw: the same sizes (within a few images), not the same images.
    """

    read: Callable[[Path], tuple[Split, Split]]  # data_dir -> train, test
    view: View
    test_name: str
    classes: int | None = None       # None, and so on: not checked
    train_images: int | None = None
    test_images: int | None = None
    steps: int | None = None         # of 512 images
    warmup: int | None = None        # of these steps
    rates: tuple[float, ...] = ()    # base learning rates that are tried
    held_out: float | None = None    # share of train on which one of them is chosen
    resolution: int | None = None    # pixels


def load(dataset: str, *, data_dir: str = "data", labels: str | None = None, val_fraction: float = 0.0,
         seed: int = 42, in_chans: int = 3) -> Data:
    """Reads a named set (`NAMED`) or a folder; files are listed, not decoded.

    labels: a CSV (`read_labels`) of images in the folder; None: its folders are the classes.
    `val_fraction` of train (seeded, stratified) becomes the validation part, unless the folder has both
    val/ and test/. Images have `in_chans` channels: 3 are RGB, 1 is grey, others must be stored so (`decode`).
    ValueError or OSError: a sentence on what was found and expected.
    """
    if not 0 <= val_fraction < 1:
        raise ValueError(f"val_fraction is {val_fraction:g}: the share of train to hold out is 0 to below 1.")
    if labels is not None:
        data = _labelled(dataset, Path(labels), seed, in_chans)
    elif dataset in NAMED:
        data = _named(dataset, Path(data_dir), in_chans)
    else:
        data = _folder(dataset, seed, in_chans)
    if not val_fraction:
        return data
    if data.val is not None:
        log.warning("val_fraction %g is ignored: %s has a validation part of its own.", val_fraction, dataset)
        return data
    kept, held = stratified(data.train.labels, val_fraction, seed)
    if not len(held):
        raise ValueError("Each class has one training image only: none can be held out for validation.")
    log.info("%d of %d training images are held out for validation (stratified, seed %d).",
             len(held), len(data.train), seed)
    return replace(data, train=data.train.subset(kept), val=data.train.subset(held))


def check_there(dataset: str, labels: str | None = None) -> None:
    """The errors of `load` for what is not there at all, before anything else takes its time."""
    if dataset not in NAMED and not Path(dataset).is_dir():
        _refuse(dataset)
    if labels is not None:
        check_file(Path(labels))


def stratified(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Labels (N,) -> positions kept and held out, each sorted; about `fraction` of every class is held out.

    A class of two images or more keeps at least one on each side; a single image is kept. Labels (N, C) of 0 and 1:
    an image belongs to its rarest class, as chance is unfair to small numbers only; each class keeps one at least.
    """
    if labels.ndim == 2:
        return _keep_each(labels, *stratified(_rarest(labels), fraction, seed))
    if not 0 < fraction < 1:
        raise ValueError(f"The share to hold out is {fraction:g}: expected more than 0 and less than 1.")
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    order = shuffled[labels[shuffled].argsort(stable=True)]  # class by class, in random order within each
    counts = labels.bincount()
    rank = torch.arange(len(labels)) - (counts.cumsum(0) - counts)[labels[order]]  # position within its class
    wanted = (counts * fraction).round().long().clamp(min=1)
    held = rank < torch.minimum(wanted, counts - 1)[labels[order]]
    return order[~held].sort().values, order[held].sort().values


def _rarest(labels: Tensor) -> Tensor:
    """(N, C) of 0 and 1 -> (N,): each image's class with the fewest images; C for an image without a class."""
    order = labels.sum(dim=0).argsort(stable=True)
    return order[labels[:, order].argmax(dim=1)].where(labels.any(dim=1), labels.shape[1])


def _keep_each(labels: Tensor, kept: Tensor, held: Tensor) -> tuple[Tensor, Tensor]:
    """Takes back an image of each class (N, C) whose few images were all held out, with classes rarer than it."""
    for label in (labels[kept].sum(dim=0) == 0).nonzero().flatten():
        back = held[labels[held, label] > 0][:1]
        if len(back) and not labels[kept, label].any():  # an image that came back may have brought it
            kept, held = torch.cat([kept, back]).sort().values, held[held != back]
    return kept, held


def _splits(read: Callable[[Path], tuple[sets.Part, sets.Part]]) -> Callable[[Path], tuple[Split, Split]]:
    """A reader of `utils/sets.py`, which knows no splits, as one that returns them."""
    return lambda data_dir: tuple(Split(*part) for part in read(data_dir))


def _digits(data_dir: Path) -> tuple[Split, Split]:
    """The digits in two, as they come in one part."""
    split = Split(*sets.digits())
    kept, held = stratified(split.labels, HELD_OUT, DIGITS_SEED)
    return split.subset(kept), split.subset(held)


# Counts are the publishers'. Steps and rates are those of Dosovitskiy et al. 2021 (arXiv 2010.11929), Table 4; the
# shares held out of B.1.1; 384 px of 4.1 (Table 2 has ImageNet at 512 and 518). It is silent on warm-up: 500 stands in
# vit_jax/configs/common.py, 100 of 500 steps in vit_jax/configs/augreg.py, AugReg (Steiner et al. 2022, Table 4, Pets)
# and big_vision/configs/transfer.py (Pets and Flowers). ImageNet's .06 is for all models in Table 4, for ResNets and
# hybrids in B.1.1: the paper disagrees with itself.
RATES = (0.001, 0.003, 0.01, 0.03)
CIFAR = dict(train_images=50_000, test_images=10_000, steps=10_000, warmup=500, rates=RATES, held_out=0.02,
             resolution=384)
OXFORD = dict(steps=500, warmup=100, rates=RATES, held_out=0.10, resolution=384)
NAMED: dict[str, NamedSet] = {
    "cifar10": NamedSet(_splits(partial(sets.cifar, name="CIFAR10")), View(), "test", 10, **CIFAR),
    "cifar100": NamedSet(_splits(partial(sets.cifar, name="CIFAR100")), View(), "test", 100, **CIFAR),
    "digits": NamedSet(_digits, View(min_area=0.6, flip=False),  # writing has no mirror
                       "a fixed 20 % of digits", 10, 1438, 359),
    "pets": NamedSet(_splits(sets.pets), View(), "test", 37, 3680, 3669, **OXFORD),
    "flowers": NamedSet(_splits(sets.flowers), View(), "test", 102, 2040, 6149, **OXFORD),
    "imagenet": NamedSet(_splits(sets.imagenet), View(), "val/", 1000, 1_281_167, 50_000, steps=20_000, warmup=500,
                         rates=(0.003, 0.01, 0.03, 0.06), held_out=0.01, resolution=384),
}


def _named(dataset: str, data_dir: Path, in_chans: int) -> Data:
    """A set of the table, whole. ValueError: other counts than the published ones, or channels it cannot have."""
    if in_chans not in (1, 3):
        raise ValueError(f"--in_chans is {in_chans}; {dataset} comes with 3 channels, or with 1 as grey images.")
    if Path(dataset).is_dir():  # before a download
        log.info("%s is the named set; for the folder here write %s.", dataset, Path(dataset).absolute())
    named = NAMED[dataset]
    train, test = named.read(data_dir)
    found = len(train), len(test), len(train.classes)
    published = named.train_images, named.test_images, named.classes
    if any(count not in (None, here) for here, count in zip(found, published)):
        numbers = "{} training and {} test images of {} classes"
        raise ValueError(f"{dataset} in {data_dir} has {numbers.format(*found)}, where {numbers.format(*published)} "
                         "were published: it was unpacked in part, or is a selection, which --dataset takes as a "
                         "folder.")
    if in_chans == 1:
        train, test = _grey(train), _grey(test)
    return Data(dataset, train, None, test, named.view, named.test_name)


def _grey(split: Split) -> Split:
    """A split of RGB images with one channel, made by Pillow in memory as it is for files."""
    if not isinstance(split.images, Tensor):
        return replace(split, channels=1)
    N, C, H, W = split.images.shape
    tall = split.images.permute(0, 2, 3, 1).reshape(N * H, W, C).numpy()  # all at once, one below the other
    grey = torch.from_numpy(np.array(Image.fromarray(tall).convert("L")))
    return replace(split, images=grey.view(N, 1, H, W), channels=1)


def _folder(dataset: str, seed: int, channels: int) -> Data:
    """DIR/train/CLASS/* with test/ or val/, or DIR/CLASS/*; with no part to score, one is split off train."""
    root = Path(dataset)
    if not root.is_dir():
        _refuse(dataset)
    name, parts = root.resolve().name, _parts(root)
    train = _scan(parts.get("train", root), channels)
    if len(train.classes) < 2:  # each has an image at least, so two classes are two images
        raise ValueError(f"{parts.get('train', root)} has one class only, {train.classes[0]} ({len(train)} "
                         f"images): training needs two or more. Expected {LAYOUT}.")
    scored = parts.get("test", parts.get("val"))
    if scored is None:
        return _held_out(name, f"{root} has neither test/ nor val/", train, seed)
    val = _scan(parts["val"], channels, train.classes) if {"val", "test"} <= parts.keys() else None
    return Data(name, train, val, _scan(scored, channels, train.classes), View(), f"{scored.name}/")


def _labelled(dataset: str, file: Path, seed: int, channels: int) -> Data:
    """The images of a folder that `file` lists, with its labels and parts."""
    if dataset in NAMED:
        raise ValueError(f"--labels {file} is for images in a folder, but {dataset} is a named set with labels of its "
                         "own: give the images' folder as --dataset.")
    root = Path(dataset)
    if not root.is_dir():
        _refuse(dataset)
    table = read_labels(file, root)
    parts = {part: Split(files, labels, table.classes, channels) for part, (files, labels) in table.parts.items()}
    name, train = root.resolve().name, parts["train"]
    if train.multi_label:
        log.info("%s: images have several labels or none (%.3g on average of %d), so each class is a yes or no.",
                 file, train.labels.sum(dim=1).mean(), len(train.classes))
    scored = "test" if "test" in parts else "val"
    if scored not in parts:
        return _held_out(name, f"{file} has rows of neither test nor val", train, seed)
    val = parts["val"] if len(parts) == 3 else None
    return Data(name, train, val, parts[scored], View(), f"{scored} in {file.name}")


def _held_out(name: str, found: str, train: Split, seed: int) -> Data:
    """A fifth of train becomes the part to score, as there is none; `found` says so."""
    kept, held = stratified(train.labels, HELD_OUT, seed)
    if not len(held):
        raise ValueError(f"{found}: with no test part and one image in each class none can be held out.")
    log.info("%s: %d of %d images (20 %%, stratified, seed %d) are held out as its test part.",
             found, len(held), len(train), seed)
    return Data(name, train.subset(kept), None, train.subset(held), View(), "held-out 20 % of train")


def _refuse(dataset: str) -> None:
    """Says what `dataset` is, as it is neither a named set nor a folder."""
    if Path(dataset).exists():
        raise ValueError(f"{dataset} is a file; expected a folder ({LAYOUT}).")
    near = difflib.get_close_matches(dataset.lower(), NAMED, n=1)
    raise FileNotFoundError(f"{dataset} is neither a named set ({', '.join(NAMED)}) nor a folder that exists."
                            + (f" Did you mean {near[0]}?" if near else ""))


def _parts(root: Path) -> dict[str, Path]:
    """The folders of train, val and test in `root` under any usual name; empty: `root` holds the classes."""
    folders, parts = _folders(root), {}
    for part, names in PARTS.items():
        found = [folder for folder in folders if folder.lower() in names]
        if len(found) > 1:
            raise ValueError(f"{root} has both {found[0]}/ and {found[1]}/: keep one of them as {part}/.")
        if found:
            parts[part] = root / found[0]
    if parts and "train" not in parts:
        raise ValueError(f"{root} has {next(iter(parts.values())).name}/ but no train/. Expected {LAYOUT}.")
    if not parts:  # one level too high, several sets would pass for classes
        inner = next((root / folder for folder in folders
                      if any(name.lower() in PARTS["train"] for name in _folders(root / folder))), None)
        if inner is not None:
            raise ValueError(f"{root} is not a set of images itself but holds one: give {inner}.")
    return parts


def _folders(root: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(root) if entry.name[0] != "." and entry.is_dir())


def _scan(root: Path, channels: int, classes: tuple[str, ...] | None = None) -> Split:
    """ROOT/CLASS/**/* -> sorted files, labelled by the place of CLASS in `classes` (None: those found)."""
    skipped = Counter()
    found = {name: _images(root / name, skipped) for name in _folders(root)}
    loose = sum(suffix_of(entry.name) in SUFFIXES for entry in os.scandir(root))
    if not found:
        raise ValueError(f"{root} holds {loose} images and no class folders. Expected {LAYOUT}.")
    if unknown := sorted(found.keys() - set(classes or found)):
        raise ValueError(f"{root / unknown[0]} is a class that train lacks; there: {_some(classes)}.")
    missing = [name for name in classes or found if not found.get(name)]
    if missing and classes is None:
        raise ValueError(f"{root / missing[0]} holds no images ({' '.join(sorted(SUFFIXES))}): "
                         "fill this class folder or remove it.")
    classes = classes or tuple(found)
    paths = [root / name / file for name in classes for file in found.get(name, ())]
    if not paths:
        raise ValueError(f"{root} holds no images in its class folders ({' '.join(sorted(SUFFIXES))}).")
    if missing:
        log.info("%s has no images of %s; class numbers stay those of train.", root, _some(missing))
    if loose:
        log.warning("%s: %d images lie outside of the class folders and are ignored.", root, loose)
    if skipped:
        kinds = ", ".join(f"{count} {suffix or 'without suffix'}" for suffix, count in skipped.most_common(5))
        log.warning("%s: %d files with other suffixes are ignored (%s).", root, skipped.total(), kinds)
    counts = torch.tensor([len(found.get(name, ())) for name in classes])
    return Split(paths, torch.repeat_interleave(counts), classes, channels)


def _images(folder: Path, skipped: Counter) -> list[str]:
    """Image files below `folder`, relative to it, sorted alike on every system; counts other suffixes."""
    files, todo = [], [""]
    while todo:
        prefix = todo.pop()
        for entry in os.scandir(folder / prefix):  # several times as fast as Path.rglob
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                todo.append(f"{prefix}{entry.name}/")
            elif (suffix := suffix_of(entry.name)) in SUFFIXES:
                files.append(prefix + entry.name)
            elif suffix not in NOTES:
                skipped[suffix] += 1
    return sorted(files)


def _some(names, most: int = 10) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
