"""A named set or a folder of images -> `Data`: labelled splits, and how a training image is looked at."""

import difflib
import logging
import os
import warnings
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

log = logging.getLogger(__name__)

ARRAY = ".npy"  # an image as it is, of any number of channels
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ARRAY}
NOTES = {".txt", ".csv", ".tsv", ".json", ".md", ".db", ".ini"}  # usual beside images: no word
PARTS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}
LAYOUT = "DIR/train/CLASS/*.jpg with DIR/test/CLASS/* or DIR/val/CLASS/* beside it, or DIR/CLASS/*.jpg"
HELD_OUT = 0.2  # the share of train that becomes the test part where a folder has none
DIGITS_SEED = 0  # the test part of digits is the same in every run
STORED = {2: "LA", 4: "RGBA"}  # channels that are no colour: the modes of Pillow that hold so many, taken as they are


@dataclass(frozen=True)
class Split:
    """N labelled images, decoded or still files."""

    images: Tensor | list[Path]  # (N, channels, H, W) uint8, or the files, still to be decoded
    labels: Tensor  # (N,) int64
    classes: tuple[str, ...]
    channels: int = 3  # that files are decoded to

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices) -> "Split":
        """The images at these positions, in this order."""
        indices = torch.as_tensor(indices, dtype=torch.int64)
        images = self.images
        images = images[indices] if isinstance(images, Tensor) else [images[i] for i in indices.tolist()]
        return replace(self, images=images, labels=self.labels[indices])


@dataclass(frozen=True)
class View:
    """How a training image is looked at: Google's random box takes `min_area` to 100 % of the area."""

    min_area: float = 0.05
    flip: bool = True


@dataclass(frozen=True)
class Data:
    name: str
    train: Split
    val: Split | None  # selects `best`; None: nothing held out
    test: Split  # scored at the end
    view: View
    test_name: str  # what the scored part is, in words for the log


@dataclass(frozen=True)
class NamedSet:
    read: Callable[[Path], tuple[Split, Split]]  # data_dir -> train, test
    view: View
    test_name: str


def load(dataset: str, *, data_dir: str = "data", val_fraction: float = 0.0, seed: int = 42,
         in_chans: int = 3) -> Data:
    """Reads a named set (`NAMED`) or a folder; files are listed, not decoded.

    `val_fraction` of train (seeded, stratified) becomes the validation part, unless the folder has both
    val/ and test/. Images have `in_chans` channels: 3 are RGB, 1 is grey, others must be stored so (`decode`).
    ValueError or OSError: a sentence on what was found and expected.
    """
    if not 0 <= val_fraction < 1:
        raise ValueError(f"val_fraction is {val_fraction:g}: the share of train to hold out is 0 to below 1.")
    if dataset in NAMED:
        if in_chans not in (1, 3):
            raise ValueError(f"--in_chans is {in_chans}; {dataset} comes with 3 channels, or with 1 as grey images.")
        named = NAMED[dataset]
        train, test = named.read(Path(data_dir))
        if in_chans == 1:
            train, test = _grey(train), _grey(test)
        data = Data(dataset, train, None, test, named.view, named.test_name)
        if Path(dataset).is_dir():
            log.info("%s is the named set; for the folder here write %s.", dataset, Path(dataset).absolute())
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


def stratified(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Labels (N,) -> positions kept and held out, each sorted; about `fraction` of every class is held out.

    A class of two images or more keeps at least one on each side; a single image is kept.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"The share to hold out is {fraction:g}: expected more than 0 and less than 1.")
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    order = shuffled[labels[shuffled].argsort(stable=True)]  # class by class, in random order within each
    counts = labels.bincount()
    rank = torch.arange(len(labels)) - (counts.cumsum(0) - counts)[labels[order]]  # position within its class
    wanted = (counts * fraction).round().long().clamp(min=1)
    held = rank < torch.minimum(wanted, counts - 1)[labels[order]]
    return order[~held].sort().values, order[held].sort().values


def _cifar(data_dir: Path, name: str) -> tuple[Split, Split]:
    """CIFAR as torchvision keeps it: found where it is unpacked, else downloaded."""
    from torchvision import datasets  # here, as folders and digits do without it

    cifar = getattr(datasets, name)
    try:
        parts = [cifar(data_dir, train=part) for part in (True, False)]
    except RuntimeError:  # torchvision's word for: not there, or not the genuine files
        log.info("Downloading %s into %s.", cifar.url, data_dir)
        try:
            parts = [cifar(data_dir, train=part, download=True) for part in (True, False)]
        except (OSError, RuntimeError, EOFError) as error:
            raise OSError(
                f"{name} is not in {data_dir}; downloading {cifar.url} failed ({error}). "
                f"Put {cifar.filename} or the folder {cifar.base_folder} there by hand.") from error
    train, test = (Split(torch.from_numpy(np.ascontiguousarray(part.data.transpose(0, 3, 1, 2))),
                         torch.tensor(part.targets), tuple(part.classes)) for part in parts)
    return train, test


def _digits(data_dir: Path) -> tuple[Split, Split]:
    """scikit-learn's bundled 1,797 digits of 8 x 8; values 0 to 16 become 0 to 255."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    grey = torch.from_numpy(digits.images * 255 / 16).round().to(torch.uint8)
    images = grey[:, None].expand(-1, 3, -1, -1).contiguous()  # (N, 3, 8, 8)
    split = Split(images, torch.from_numpy(digits.target).long(), tuple(map(str, digits.target_names)))
    kept, held = stratified(split.labels, HELD_OUT, DIGITS_SEED)
    return split.subset(kept), split.subset(held)


NAMED: dict[str, NamedSet] = {
    "cifar10": NamedSet(lambda data_dir: _cifar(data_dir, "CIFAR10"), View(), "test"),
    "cifar100": NamedSet(lambda data_dir: _cifar(data_dir, "CIFAR100"), View(), "test"),
    "digits": NamedSet(_digits, View(min_area=0.6, flip=False), "a fixed 20 % of digits"),  # writing has no mirror
}


def _grey(split: Split) -> Split:
    """A split of RGB images in memory with one channel, made by Pillow as it is for files."""
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
        kept, held = stratified(train.labels, HELD_OUT, seed)
        if not len(held):
            raise ValueError(f"{root} has no test part and one image in each class, so none can be held out.")
        log.info("%s has neither test/ nor val/: %d of %d images (20 %%, stratified, seed %d) are held out "
                 "as its test part.", root, len(held), len(train), seed)
        return Data(name, train.subset(kept), None, train.subset(held), View(), "held-out 20 % of train")
    val = _scan(parts["val"], channels, train.classes) if {"val", "test"} <= parts.keys() else None
    return Data(name, train, val, _scan(scored, channels, train.classes), View(), f"{scored.name}/")


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
    loose = sum(_suffix(entry.name) in SUFFIXES for entry in os.scandir(root))
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
            elif (suffix := _suffix(entry.name)) in SUFFIXES:
                files.append(prefix + entry.name)
            elif suffix not in NOTES:
                skipped[suffix] += 1
    return sorted(files)


def _suffix(name: str | Path) -> str:
    return os.path.splitext(name)[1].lower()


def _some(names, most: int = 10) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def decode(path, channels: int = 3) -> Tensor:
    """File -> (channels, H, W) uint8, turned upright. ValueError: not a readable image, or of other channels.

    3 channels are RGB, 1 is its luminance (ITU-R 601). Others are never made, only read: 4 from RGBA with its
    fourth channel as it is (it may be near infrared), 2 from LA. A .npy has its channels whatever their number.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _decode(path, channels)


def decode_all(paths, workers: int | None = None, channels: int = 3) -> list[Tensor]:
    """Files -> (channels, H, W) uint8 each, in their order. ValueError: names the first unreadable file."""
    paths = list(paths)
    if workers is None:
        # Pillow decodes outside of Python's lock but opens inside it: threads slow thumbnails down
        sizes = [os.path.getsize(path) for path in paths[::len(paths) // 100 + 1] if os.path.exists(path)]
        workers = (os.cpu_count() or 1) if sum(sizes) > 6000 * len(sizes) else 1
    bar = {"total": len(paths), "desc": "decoding", "unit": " images", "delay": 2, "disable": None}
    with warnings.catch_warnings():  # here and not in the threads, which share one list of filters
        warnings.simplefilter("ignore")
        if workers <= 1:
            return [_decode(path, channels) for path in tqdm(paths, **bar)]
        with ThreadPoolExecutor(workers) as pool:
            return list(tqdm(pool.map(partial(_decode, channels=channels), paths), **bar))


def _decode(path, channels: int) -> Tensor:
    is_array = _suffix(path) == ARRAY
    try:
        # Pillow (to 13.0 at least) scrambles turned TIFFs that it opens by name, not those from an open file.
        with open(path, "rb") as file:
            pixels = _array(file, channels) if is_array else _picture(file, channels)  # (H, W, channels)
    except OtherChannels as error:
        raise ValueError(f"{path} {error}, and --in_chans is {channels}: give the number that your images have, or "
                         f"store them as .npy, (H, W, {channels}) uint8.") from error
    except Exception as error:  # Pillow's readers raise whatever a broken file makes them stumble over
        unknown = isinstance(error, Image.UnidentifiedImageError)
        reason = "it is empty or of an unknown format" if unknown else str(error) or type(error).__name__
        advice = "replace or remove it"
        if is_array or channels not in (1, 3):  # also what helps with a TIFF of many bands, which Pillow cannot read
            advice += f", or store it as .npy, (H, W, {channels}) uint8"
        raise ValueError(f"{path} cannot be read as an image ({reason}): {advice}.") from error
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


class OtherChannels(ValueError):
    """A sound image whose channels are not those of the model."""


def _array(file, channels: int) -> np.ndarray:
    """An open .npy of (H, W, channels) uint8, or (H, W) for one channel. ValueError: it holds anything else."""
    array = np.lib.format.read_array(file, allow_pickle=False)  # np.load would also open archives
    pixels = array[..., None] if array.ndim == 2 else array
    if array.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != channels or not pixels.size:
        raise OtherChannels(f"holds {array.shape} {array.dtype}")
    return pixels


def _picture(file, channels: int) -> np.ndarray:
    """An open image of a format that Pillow knows -> (H, W, channels) uint8, turned upright."""
    with Image.open(file) as image:
        image.load()
        with suppress(Exception):  # broken EXIF in a sound image: it stays as it lies
            ImageOps.exif_transpose(image, in_place=True)
        if channels == 3:
            return np.array(_rgb(image))
        if channels == 1:
            return np.array(_rgb(image).convert("L"))[..., None]  # grey comes back as it was
        if image.mode == "P" and image.has_transparency_data:
            image = image.convert("RGBA")
        mode = STORED.get(channels)
        if image.mode != mode:
            raise OtherChannels(f"has the channels {', '.join(image.getbands())}")
        return np.array(image)


def _rgb(image: Image.Image) -> Image.Image:
    """Any mode of Pillow -> RGB of the same brightness."""
    if image.mode.startswith(("I", "F")):
        image = _eight_bits(image)
    if image.has_transparency_data:
        # on white, as a page shows it: the colours under transparent pixels are arbitrary, often black
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Deep grey (modes I;16*, I, F) -> L, scaled by its white; `Image.convert` would clip at 255 instead.

    White is 2^bits - 1 for up to 16 bits. Wider files do not say what theirs is: 65535 for integers, for
    floats the first of 1, 255, 65535 that no value exceeds; beyond 65535 the largest value.
    """
    values = np.nan_to_num(np.asarray(image).astype(np.float64), posinf=0.0)
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(258, (16,))[0]
    whites = (1, 255, 65535) if image.mode == "F" else (2**min(bits, 16) - 1,)
    white = next((white for white in whites if values.max() <= white), values.max())
    values = (values / white).clip(0, 1)
    if tags.get(262) == 0:  # TIFF's WhiteIsZero, which Pillow honours for 8 bits only
        values = 1 - values
    return Image.fromarray((values * 255).round().astype(np.uint8))
