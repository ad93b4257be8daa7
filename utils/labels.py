"""A CSV of labels -> for each part (train, val, test) its image files and their labels. It is the user's own file, so
its paths may lead anywhere; whatever is wrong in it is one sentence with the line."""

import csv
import io
import logging
import os
import textwrap
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from utils.images import SUFFIXES, suffix_of

log = logging.getLogger(__name__)

PARTS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}
IMAGE = ("image", "file", "filename", "path", "name")  # what the column of files may be called
LABEL, SPLIT = ("label", "labels", "class"), ("split",)
TRUTH = {"0": False, "1": True, "0.0": False, "1.0": True}  # pandas writes 1.0 where a column once had gaps
FORM = "a header image,label[,split] (a|b: several labels), or image and a column of 0 and 1 for each class[,split]"


class Table(NamedTuple):
    """What a file of labels says."""
    parts: dict[str, tuple[list[Path], Tensor]]  # train, val, test, those there are: n files, labels (n,) or (n, C)
    classes: tuple[str, ...]


class Columns(NamedTuple):
    """Which column is what; `label` or `classes`, never both."""
    image: int
    split: int | None
    label: int | None
    classes: dict[str, int]


class Row(NamedTuple):
    line: int
    image: str
    labels: frozenset[str]
    part: str  # train, val or test


def read_labels(path: str | Path, root: str | Path) -> Table:
    """A CSV with a header (`FORM`, in any order; `,` `;` or tab) -> its parts; without a column split, train alone.

    Images are relative to `root`. One class an image: labels (n,) int64; with `a|b` in any label, or a column a class:
    (n, C) float32 of 0 and 1. Classes are sorted, as numbers where all are whole numbers; columns keep their order.
    ValueError: one sentence on what is wrong, with the file and the line. OSError: it cannot be opened.
    """
    path, root = Path(path), Path(root)
    records = _records(path)
    columns = _columns(path, *records[0])
    rows = [_row(path, line, fields, columns) for line, fields in records[1:]]
    if not rows:
        raise ValueError(f"{path} has a header and no rows: expected a line for each image.")
    several = bool(columns.classes)
    if columns.label is not None:
        rows, several = _named(path, rows)
    rows = _once(path, rows, root)
    _check_files(path, rows, root)
    classes = tuple(columns.classes) or _sorted(set().union(*(row.labels for row in rows)))
    _check_classes(path, rows, classes)
    parts = {part: [row for row in rows if row.part == part] for part in PARTS}
    return Table({part: ([root / row.image for row in of_part], _tensor(of_part, classes, several))
                  for part, of_part in parts.items() if of_part}, classes)


def check_file(path: Path) -> None:
    """ValueError: a folder. FileNotFoundError: nothing."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder; --labels takes a CSV file with {FORM}.")
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; --labels takes a CSV file with {FORM}.")


def _records(path: Path) -> list[tuple[int, list[str]]]:
    """(line, fields) of the header and of each row; lines without a word in them are left out."""
    check_file(path)
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line}: byte {raw[error.start]:#04x} is not UTF-8; expected a text file, which "
                         "spreadsheets save as 'CSV UTF-8'.") from error
    head = text.lstrip().split("\n")[0]
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=head.count), strict=True)
    records, line = [], 1
    try:
        for fields in reader:
            fields = [field.strip() for field in fields]
            if any(fields):
                records.append((line, fields))
            line = reader.line_num + 1  # where the next record starts; one in quotes may span lines
    except csv.Error as error:
        raise ValueError(f"{path}, line {line}: this is not CSV ({error}).") from error
    if not records:
        raise ValueError(f"{path} is empty: expected {FORM}.")
    return records


def _columns(path: Path, line: int, header: list[str]) -> Columns:
    found = textwrap.shorten(", ".join(header), 200, placeholder=" ...")
    where = f"{path}, line {line}"
    lower = [name.lower() for name in header]
    if twice := [name for name in header if lower.count(name.lower()) > 1]:
        raise ValueError(f"{where}: two columns are called '{twice[0]}'; names must differ.")
    if "" in header:
        raise ValueError(f"{where}: column {header.index('') + 1} has no name; pandas writes such a one without "
                         "index=False. Remove or name it.")
    image, label, split = ([i for i, name in enumerate(lower) if name in names] for names in (IMAGE, LABEL, SPLIT))
    if len(image) != 1:
        what = "two columns could be the images'" if image else "no column is called image"
        raise ValueError(f"{where}: {what} ({', '.join(IMAGE)}); found {found}. Expected {FORM}.")
    others = {name: i for i, name in enumerate(header) if i not in image + label + split}
    if label and (others or len(label) > 1):
        unknown = ", ".join(others) or header[label[1]]
        raise ValueError(f"{where}: beside {header[label[0]]}, what is the column {unknown}? Expected {FORM}.")
    if not label and len(others) < 2:
        raise ValueError(f"{where}: there is no column label and {'one column' if others else 'none'} that could be "
                         f"a class; found {found}. Expected {FORM}.")
    return Columns(image[0], split[0] if split else None, label[0] if label else None, others)


def _row(path: Path, line: int, fields: list[str], columns: Columns) -> Row:
    """A line as it stands: with a column of labels, its `labels` is the one text in it."""
    where = f"{path}, line {line}"
    expected = 1 + (columns.split is not None) + (columns.label is not None) + len(columns.classes)
    if len(fields) != expected:
        raise ValueError(f"{where}: {len(fields)} fields, where the header has {expected}; a field that holds the "
                         "separator needs quotes.")
    image = fields[columns.image]
    if not image:
        raise ValueError(f"{where}: the image has no name.")
    part = "train"
    if columns.split is not None:
        word = fields[columns.split].lower()
        part = next((part for part, names in PARTS.items() if word in names), None)
        if part is None:
            raise ValueError(f"{where}: the split is '{fields[columns.split]}'; expected train, val or test.")
    if columns.label is not None:
        return Row(line, image, frozenset([fields[columns.label]]), part)
    for name, i in columns.classes.items():
        if fields[i] not in TRUTH:
            raise ValueError(f"{where}: column {name} has '{fields[i]}'; each column but image and split is a class, "
                             "with 0 or 1.")
    return Row(line, image, frozenset(name for name, i in columns.classes.items() if TRUTH[fields[i]]), part)


def _named(path: Path, rows: list[Row]) -> tuple[list[Row], bool]:
    """Texts of a column of labels -> class names, and whether an image may have several: where any text holds a |."""
    several = any("|" in text for row in rows for text in row.labels)
    if several:
        return [row._replace(labels=frozenset(name.strip() for text in row.labels for name in text.split("|")) - {""})
                for row in rows], True
    if bare := [row for row in rows if "" in row.labels]:
        raise ValueError(f"{path}, line {bare[0].line}: {bare[0].image} has no label. Only in a file where images may "
                         "have several (a|b) can one have none.")
    return rows, False


def _once(path: Path, rows: list[Row], root: Path) -> list[Row]:
    """The rows without repetitions. ValueError: an image has two labels, or is in two parts."""
    seen, folder = {}, os.fspath(root)
    for row in rows:
        first = seen.setdefault(os.path.normpath(os.path.join(folder, row.image)), row)
        where = f"{path}, line {row.line}: {row.image}"
        if row.labels != first.labels:
            raise ValueError(f"{where} is {_words(row)} here and {_words(first)} in line {first.line}; several labels "
                             "of an image stand in one line, as in a|b.")
        if row.part != first.part:
            raise ValueError(f"{where} is in {row.part} here and in {first.part} in line {first.line}; what is trained "
                             "on cannot measure.")
    if len(seen) < len(rows):
        log.warning("%s: %d rows repeat an earlier one and are ignored.", path, len(rows) - len(seen))
    return list(seen.values())


def _words(row: Row) -> str:
    return "|".join(sorted(row.labels)) or "without a label"


def _check_files(path: Path, rows: list[Row], root: Path) -> None:
    """ValueError: some images are not there, or no images by their suffix."""
    if odd := next((row for row in rows if suffix_of(row.image) not in SUFFIXES), None):
        raise ValueError(f"{path}, line {odd.line}: {odd.image} is no image by its suffix; expected one of "
                         f"{' '.join(sorted(SUFFIXES))}.")
    folder = os.fspath(root)
    if missing := [row for row in rows if not os.path.isfile(os.path.join(folder, row.image))]:
        names = ", ".join(f"{row.image} (line {row.line})" for row in missing[:3]) + ", ..." * (len(missing) > 3)
        raise ValueError(f"{path}: {len(missing)} of {len(rows)} images do not exist: {names}. Names are relative to "
                         f"{root}; --dataset gives another folder.")


def _sorted(names: set[str]) -> tuple[str, ...]:
    try:
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    except ValueError:
        return tuple(sorted(names))


def _check_classes(path: Path, rows: list[Row], classes: tuple[str, ...]) -> None:
    """ValueError: there is nothing to tell apart, or train lacks a class of another part."""
    if len(classes) < 2:
        raise ValueError(f"{path} has {f'one class only, {classes[0]}' if classes else 'no class'} ({len(rows)} "
                         "images): training needs two or more.")
    found = {part: set().union(*(row.labels for row in rows if row.part == part)) for part in PARTS
             if any(row.part == part for row in rows)}
    if "train" not in found:
        raise ValueError(f"{path} has no row of train, only of {' and '.join(found)}.")
    for row in rows:
        if unknown := sorted(row.labels - found["train"]):
            raise ValueError(f"{path}, line {row.line}: no image of train has the class {unknown[0]}, but "
                             f"{row.image} of {row.part} has.")
    for part, names in found.items():
        if missing := [name for name in classes if name not in names]:
            log.warning("%s: no image of %s has the class %s%s.", path, part, ", ".join(missing[:10]),
                        ", ..." * (len(missing) > 10))


def _tensor(rows: list[Row], classes: tuple[str, ...], several: bool) -> Tensor:
    """(n,) int64, or with several labels (n, C) float32 of 0 and 1."""
    number = {name: i for i, name in enumerate(classes)}
    if not several:
        return torch.tensor([number[name] for row in rows for name in row.labels])
    labels = torch.zeros(len(rows), len(classes))
    ones = [(i, number[name]) for i, row in enumerate(rows) for name in row.labels]
    if ones:
        labels[tuple(torch.tensor(ones).T)] = 1
    return labels
