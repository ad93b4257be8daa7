"""A run whose numbers are all known, and its report as a reader's program sees it."""

import base64
import csv
import io
import json
import re
from dataclasses import asdict
from html.parser import HTMLParser

import numpy as np
from PIL import Image

from models import exchange
from utils import report
from utils.settings import Settings

CLASSES = ("ant", "bee", "cat", "dog", "eel")

ASKING = {"src", "srcset", "href", "xlink:href", "data", "action", "poster", "background", "ping", "manifest"}
VOID = {"img", "meta", "link", "wbr"}


class Page(HTMLParser):
    """elements: (name, attributes); text: all that is said; tables: rows of cells; paths: {id of a group: the points
    (N, 2) of its first path}; images: (H, W, 3) uint8 each."""

    def __init__(self, html: str):
        super().__init__()
        self.elements, self.open, self.tables, self.images = [], [], [], []
        self.text, self.css, self.title, self.paths, self.marks = "", "", "", {}, {}
        self.group = None
        self.feed(html)
        assert self.open == [], f"{self.open} were not closed"

    def handle_starttag(self, name, attributes):
        found = dict(attributes)
        self.elements.append((name, found))
        if name not in VOID:
            self.open.append(name)
        if name == "table":
            self.tables.append([])
        elif name == "tr":
            self.tables[-1].append([])
        elif name in ("td", "th"):
            self.tables[-1][-1].append("")
        elif name == "g" and "id" in found:
            self.group = found["id"]
        elif name == "path" and self.group is not None:
            self.paths.setdefault(self.group, found["d"])
        elif name == "use":
            self.marks.setdefault(self.group, []).append((float(found["x"]), float(found["y"])))
        elif name == "img":
            data = base64.b64decode(found["src"].partition(",")[2])
            self.images.append(np.array(Image.open(io.BytesIO(data)).convert("RGB")))

    def handle_startendtag(self, name, attributes):
        self.handle_starttag(name, attributes)
        if name not in VOID:
            self.handle_endtag(name)

    def handle_endtag(self, name):
        assert self.open.pop() == name, f"</{name}> closes something else"

    def handle_data(self, data):
        if "style" in self.open:
            self.css += data
        elif "title" in self.open:
            self.title += data
        else:
            self.text += data
            if self.open and {"td", "th"} & set(self.open) and self.tables:
                self.tables[-1][-1][-1] += data

    def curve(self, id: str) -> np.ndarray:
        """(N, 2), the corners of a curve on the page."""
        return np.array(re.findall(r"[ML] (\S+) (\S+)", self.paths[id]), dtype=float)

    def table(self, head: str) -> list[list[str]]:
        """The table with this cell in its first row."""
        return next(table for table in self.tables if head in table[0])

    def asks(self) -> list[str]:
        """Addresses that a browser would go to."""
        found = [value or "" for _, attributes in self.elements for name, value in attributes.items() if name in ASKING]
        everything = [self.css, *(value or "" for _, attributes in self.elements for value in attributes.values())]
        found += [address for text in everything for address in re.findall(r"url\(\s*[\"']?([^)\"']*)", text)]
        found += re.findall("@import.*", self.css)
        return [address for address in found if not address.startswith(("#", "data:"))]


def page_of(*folders):
    """The report of a run, or of several."""
    return Page(report.write(folders).read_text(encoding="utf-8"))


def write_run(root, model, name="run", values=(), answers=None, classes=CLASSES, about=(), **settings):
    """A finished run of 40 steps on 25 images of 16 px, five of each class, as train.py leaves it -> its folder.

    values: {(name, step): value} that are others, or more, in metrics.jsonl. answers: (label, predicted, confidence).
    """
    folder = root / "output" / name
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    lines = {(f"train/{what}", step): float(value) for what in ("loss", "accuracy", "lr", "grad_norm")
             for step, value in enumerate(rng.random(40), start=1)}
    lines |= {("train/images_per_second", step): 100.0 + step for step in (10, 20, 30, 40)}
    lines |= {(f"test/{what}", step): float(rng.random()) for step in (20, 40) for what in ("accuracy", "loss")}
    answers = answers or [(classes[i // 5], classes[(i // 5 + (i % 5 == 0)) % 5], 0.4 + 0.02 * i)
                          for i in range(25)]  # the first of each class is taken for the next class
    right = sum(label == predicted for label, predicted, _ in answers) / len(answers)
    lines |= {("best/test_accuracy", 40): right, **dict(values)}
    with open(folder / "metrics.jsonl", "w") as file:
        for (what, step), value in sorted(lines.items(), key=lambda line: line[0][1]):
            file.write(json.dumps({"step": step, "name": what, "value": value, "time": 1e9 + 2 * step}) + "\n")
    images = picture_files(root / "images", len(answers))
    with open(folder / "predictions.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["image", "label", "predicted", "confidence"],
                                    *([image, *answer] for image, answer in zip(images, answers))])
    given = asdict(Settings(dataset=str(root / "images"), num_steps=40, **settings))
    resolved = {"name": name, "precision": "float32", "device": "cpu", "threads": 2}
    (folder / "settings.json").write_text(json.dumps({
        **given, "resolved": resolved, "where": {"dataset": str(root / "images"), "labels": None},
        "command": "python train.py --name 'a b'"}))
    exchange.save(model, folder / "last.safetensors", {
        "classes": list(classes), "step": 40, "accuracy": {"test": right}, "versions": {"torch": "2.9.1"},
        "finetuned_from": {"name": "ViT-X.npz", "sha256": "0123456789abcdef"}, **dict(about)})
    return folder


def picture_files(folder, count):
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(1)
    for i in range(count):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3)).astype(np.uint8)).save(folder / f"{i}.png")
    return [folder / f"{i}.png" for i in range(count)]
