"""Named sets as their publishers pack them -> labelled images, with the publishers' splits and class numbers (from 0).

A reader finds its set below `data_dir` where it is unpacked and else has torchvision download it, checksums included.
ValueError or OSError: one sentence on what is missing or wrong. torchvision and SciPy are imported where they are
used, as folders do without them.
"""

import logging
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from utils.images import suffix_of

log = logging.getLogger(__name__)

PETS = "https://www.robots.ox.ac.uk/~vgg/data/pets/data/"
FLOWERS = "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/"
IMAGENET = "https://image-net.org"
WNID = re.compile(r"n\d{8}")  # a class of ImageNet in WordNet
Made = TypeVar("Made")


class Part(NamedTuple):
    """N labelled images: the first fields of a `Split`."""
    images: Tensor | list[Path]  # (N, 3, H, W) uint8, or files, still to be decoded
    labels: Tensor               # (N,) int64
    classes: tuple[str, ...]


def cifar(data_dir: Path, name: str) -> tuple[Part, Part]:
    """CIFAR10 or CIFAR100 (Krizhevsky 2009), as torchvision calls them: 32-px images in memory."""
    from torchvision import datasets

    kind = getattr(datasets, name)
    try:
        parts = [kind(data_dir, train=part) for part in (True, False)]
    except RuntimeError:  # torchvision's word for: not there, or not the genuine files
        parts = _downloaded(lambda: [kind(data_dir, train=part, download=True) for part in (True, False)], name,
                            kind.url, data_dir, f"{kind.filename} or the folder {kind.base_folder} there")
    train, test = (Part(torch.from_numpy(np.ascontiguousarray(part.data.transpose(0, 3, 1, 2))),
                        torch.tensor(part.targets), tuple(part.classes)) for part in parts)
    return train, test


def digits() -> Part:
    """scikit-learn's bundled 1,797 digits of 8 x 8; values 0 to 16 become 0 to 255."""
    from sklearn.datasets import load_digits

    found = load_digits()
    grey = torch.from_numpy(found.images * 255 / 16).round().to(torch.uint8)
    images = grey[:, None].expand(-1, 3, -1, -1).contiguous()  # (N, 3, 8, 8)
    return Part(images, torch.from_numpy(found.target).long(), tuple(map(str, found.target_names)))


def pets(data_dir: Path) -> tuple[Part, Part]:
    """Oxford-IIIT Pet (Parkhi et al. 2012): trainval and test, in the order of its lists; 37 breeds."""
    root = data_dir / "oxford-iiit-pet"
    images, lists = root / "images", root / "annotations"
    if not (images.is_dir() and lists.is_dir()):
        from torchvision import datasets
        _downloaded(lambda: datasets.OxfordIIITPet(data_dir, download=True), "Oxford-IIIT Pet", PETS, data_dir,
                    f"images.tar.gz and annotations.tar.gz, or the folders images and annotations, in {root}")
    rows = {part: _pet_list(lists / f"{part}.txt") for part in ("trainval", "test")}
    names = {number: image.rpartition("_")[0] for image, number in rows["trainval"] + rows["test"]}
    if sorted(names) != list(range(len(names))):
        raise ValueError(f"The lists in {lists} number {len(names)} classes from {min(names) + 1} to {max(names) + 1}: "
                         f"some are missing. Remove {lists} and the set is unpacked anew.")
    classes = tuple(names[number].replace("_", " ").title() for number in sorted(names))  # as torchvision writes them
    files = _listed(images, [[f"{image}.jpg" for image, _ in part] for part in rows.values()])
    train, test = (Part(found, torch.tensor([number for _, number in part]), classes)
                   for found, part in zip(files, rows.values()))
    return train, test


def _pet_list(file: Path) -> list[tuple[str, int]]:
    """(image without suffix, class from 0) of each line `Abyssinian_100 1 1 1`: image, class, species, breed."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: the set was unpacked in part. Remove {file.parent} and it is "
                                "unpacked anew.")
    rows = []
    for line, text in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        words = text.split()
        if len(words) != 4 or not words[1].isdecimal() or words[1] == "0":
            raise ValueError(f"{file}, line {line}: expected an image and three numbers, as in Abyssinian_100 1 1 1; "
                             f"found {text[:80]!r}.")
        rows.append((words[0], int(words[1]) - 1))
    if not rows:
        raise ValueError(f"{file} is empty. Remove {file.parent} and it is unpacked anew.")
    return rows


def flowers(data_dir: Path) -> tuple[Part, Part]:
    """Oxford Flowers-102 (Nilsback & Zisserman 2008): its training and validation lists as one part (Dosovitskiy et
    al. 2021 train on both), then its test list, each in the order of setid.mat."""
    from torchvision import datasets

    root = data_dir / "flowers-102"
    images, sets, labels = root / "jpg", root / "setid.mat", root / "imagelabels.mat"
    if not (images.is_dir() and sets.is_file() and labels.is_file()):
        _downloaded(lambda: datasets.Flowers102(data_dir, download=True), "Oxford Flowers-102", FLOWERS, data_dir,
                    f"102flowers.tgz (or its folder jpg), setid.mat and imagelabels.mat in {root}")
    classes = tuple(getattr(datasets.Flowers102, "classes", ()))
    if not classes:  # before pytorch/vision#8838 of January 2025
        classes = tuple(map(str, range(1, 103)))
        log.warning("This torchvision is too old to name the classes of flowers: they are called 1 to 102.")
    ids = [np.concatenate([_numbers(sets, key) for key in part]) for part in (("trnid", "valid"), ("tstid",))]
    every = _numbers(labels, "labels")  # of images 1, 2, ...
    if max(part.max() for part in ids) > len(every) or every.max() > len(classes):
        raise ValueError(f"{sets} counts {max(part.max() for part in ids):,} images, {labels} {len(every):,} of "
                         f"{every.max()} classes: expected {len(classes)} classes and as many images in both.")
    files = _listed(images, [[f"image_{i:05d}.jpg" for i in part] for part in ids])
    train, test = (Part(found, torch.from_numpy(every[part - 1] - 1), classes) for found, part in zip(files, ids))
    return train, test


def _numbers(file: Path, key: str) -> np.ndarray:
    """(n,) int64 of 1 and more, out of a file of MATLAB's."""
    from scipy.io import loadmat

    try:
        numbers = loadmat(file)[key].ravel().astype(np.int64)
        if not numbers.min() >= 1:
            raise ValueError(f"{key} has {numbers.min()}")
    except Exception as error:  # SciPy raises what it likes for a damaged file
        raise ValueError(f"{file} is damaged ({type(error).__name__}: {error}). Remove it and it is downloaded anew."
                         ) from error
    return numbers


def imagenet(data_dir: Path) -> tuple[Part, Part]:
    """ImageNet (ILSVRC 2012) in class folders: train, and the validation images that everybody tests on.

    Classes are the WordNet ids in sorted order, that of Google's heads, of `models.published.imagenet_classes` (their
    names) and of the ReaL labels. `evaluate.py` matches ids with the classes of any model of ImageNet; a name has
    several spellings.
    """
    root = data_dir / "imagenet"
    lacks = [part for part in ("train", "val")
             if not ((root / part).is_dir() and any(map(WNID.fullmatch, os.listdir(root / part))))]
    if lacks:
        raise FileNotFoundError(
            f"ImageNet is not in {root} (no class folders in {' and '.join(f'{part}/' for part in lacks)}) and comes "
            f"only with an account of {IMAGENET}: unpack ILSVRC2012_img_train.tar to {root}/train/nXXXXXXXX/*.JPEG and "
            f"ILSVRC2012_img_val.tar, its images sorted into class folders, to {root}/val/nXXXXXXXX/*.JPEG.")
    train = _by_wnid(root / "train")
    return train, _by_wnid(root / "val", train.classes)


def _by_wnid(root: Path, classes: tuple[str, ...] | None = None) -> Part:
    """ROOT/nXXXXXXXX/*.JPEG, sorted; labels are places in `classes` (None: those found)."""
    found = sorted(name for name in os.listdir(root) if WNID.fullmatch(name))
    classes = classes or tuple(found)
    if unknown := sorted(set(found) - set(classes)):
        raise ValueError(f"{root / unknown[0]} is a class that train lacks: train was unpacked in part.")
    images, labels = [], []
    for wnid in found:
        names = sorted(name for name in os.listdir(root / wnid)
                       if suffix_of(name) in (".jpeg", ".jpg") and name[0] != ".")
        images += [root / wnid / name for name in names]
        labels += [classes.index(wnid)] * len(names)
    return Part(images, torch.tensor(labels, dtype=torch.int64), classes)


def _listed(folder: Path, parts: Sequence[list[str]]) -> list[list[Path]]:
    """The files of these names, part by part. ValueError: some are not there."""
    there = set(os.listdir(folder))
    names = [name for part in parts for name in part]
    if missing := [name for name in names if name not in there]:
        raise ValueError(f"{folder} has {len(names) - len(missing):,} of the {len(names):,} images that the set lists "
                         f"and lacks {missing[0]}: it was unpacked in part. Remove this folder and it is unpacked "
                         "anew.")
    return [[folder / name for name in part] for part in parts]


def _downloaded(make: Callable[[], Made], name: str, url: str, data_dir: Path, by_hand: str) -> Made:
    """What torchvision makes of its download, whose progress it shows. OSError: it failed, and how to go on."""
    log.info("Downloading %s into %s.", url, data_dir)
    try:
        return make()
    except (OSError, RuntimeError, EOFError) as error:
        raise OSError(f"{name} is not in {data_dir}; downloading {url} failed ({error}). Put {by_hand} by hand."
                      ) from error
