"""The most confident mistakes of a run: what the model saw, and where its attention came from."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from models.attention import rollout
from models.modeling import VisionTransformer
from utils import data
from utils.batches import EvalBatches
from utils.data import NAMED, Split
from utils.history import History, Predictions
from utils.pictures import over_pixels, overlay, shown
from utils.runs import data_of
from utils.trained import Trained, open_trained

CPU = torch.device("cpu")  # a dozen images, at the end of a run whose GPU may be full


class Look(NamedTuple):
    """One image, (H, W, 3) uint8, as the model saw it."""
    image: np.ndarray
    attention: np.ndarray  # rollout laid over it


def worst(said: Predictions, most: int) -> list[int]:
    """The positions of wrong predictions, the most confident first; of equals the first."""
    wrong = (~said.right).nonzero()[:, 0]
    return wrong[said.confidence[wrong].argsort(descending=True, stable=True)[:most]].tolist()


def looks(history: History, places: Sequence[int]) -> list[Look | str]:
    """The images at these positions of the predictions, exactly as an evaluation sees them; instead of one that cannot
    be read a sentence. ValueError, OSError: none of them can be shown, and why."""
    if history.weights is None:
        raise ValueError("There are no weights that could look at the images.")
    trained = open_trained(str(history.weights), CPU)
    split = _images(history, [history.predictions.images[i] for i in places], trained)
    batches = trained.batches(split, CPU, batch_size=1, workers=0)
    return [_look(trained.model, batches, k) for k in range(len(split))]


def _look(model: VisionTransformer, batches: EvalBatches, k: int) -> Look | str:
    found = batches.looks(k, slice(0, 1))
    if found.broken:
        return found.broken[0]
    image, _ = batches.on_device([found])
    pixels = shown(image, model.config)[0]
    return Look(pixels, overlay(pixels, over_pixels(model, rollout(model, image))[0]))


def _images(history: History, names: list[str], trained: Trained) -> Split:
    """The images of these names, files or numbers in a named set. Labels are of no use here: all are 0."""
    before = history.settings.get("where") or {}
    where, channels = data_of(history.settings, before), trained.model.config.in_chans
    labels, classes = torch.zeros(len(names), dtype=torch.int64), trained.classes or ()
    if all(name.isdecimal() for name in names):
        images = _named(where, channels).images
        if max(map(int, names)) >= len(images):
            raise ValueError(f"{where['dataset']} has fewer images than when the run ended.")
        return Split(images[[int(name) for name in names]], labels, classes, channels)
    files = [_now(Path(name), before.get("dataset"), where["dataset"]) for name in names]
    if not any(file.exists() for file in files):
        raise FileNotFoundError(f"The images are no longer where they were: there is no {files[0]}.")
    return Split(files, labels, classes, channels)


def _named(where: dict, channels: int) -> Split:
    """The test part of a named set that is here. OSError: it would have to be downloaded."""
    dataset, folder = where["dataset"], Path(where["data_dir"] or "data")
    if dataset not in NAMED:
        raise ValueError(f"predictions.csv numbers its images, and {dataset} is no named set.")
    if dataset.startswith("cifar") and not any(folder.glob("cifar-*")):
        raise FileNotFoundError(f"{dataset} is no longer in {folder}.")
    return data.load(dataset, data_dir=str(folder), in_chans=channels).test


def _now(file: Path, before: str | None, now: str | None) -> Path:
    """Where a file is that was in the folder `before`, which is at `now`."""
    if before and now and not file.exists() and file.is_relative_to(before):
        return Path(now, file.relative_to(before))
    return file
