"""The state of a run, `state.pt`: all that it is after a step, as numbers; written whole, two generations kept.

What it holds is not history: batches, crops, dropout masks and learning rates follow from the step (`train.py`).
"""

import io
import logging
import os
import pickle
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor, nn

from utils.averaging import Average
from utils.fitting import Fitting

log = logging.getLogger(__name__)

NEWEST, PREVIOUS = "state.pt", "state.previous.pt"
FORMAT = 1  # of the content; another one is refused


@dataclass
class State:
    """A run after `step` updates; `content` is what of it goes to the disk, and `restore` its inverse."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    fitting: Fitting = field(default_factory=Fitting)  # not restored: the flags may ask for another split
    step: int = 0
    last: dict = field(default_factory=dict)  # the last evaluation: "step", "part" and its metrics; empty before
    best: dict = field(default_factory=dict)  # the best one, with "value", what it was chosen by
    best_weights: dict[str, Tensor] = field(default_factory=dict)  # in main memory, as they may be asked for any time
    finished: dict = field(default_factory=dict)  # the metrics of all on the test set, when the run has ended
    average: Average | None = None  # of the weights
    averaged: dict = field(default_factory=dict)  # its last evaluation, as `last`

    def remember_best(self) -> None:
        """Keeps the weights as they are now as the best ones."""
        self.best_weights = {name: value.detach().to("cpu", copy=True) for name, value in
                             self.model.state_dict().items()}

    @contextmanager
    def best_in_place(self) -> Iterator[None]:
        """As long as the context lasts, the model has its best weights."""
        present = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        self.model.load_state_dict(self.best_weights)
        try:
            yield
        finally:
            self.model.load_state_dict(present)

    def content(self) -> dict[str, Any]:
        """Tensors, numbers and strings in dicts and lists. Best weights that are the present ones are not doubled."""
        present = self.best.get("step") == self.step
        return {"step": self.step, "weights": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(), "split": self.fitting.state_dict(), "last": self.last,
                "best": self.best, "finished": self.finished, "best_weights": {} if present else self.best_weights,
                **({"average": self.average.state_dict(), "averaged": self.averaged} if self.average else {})}

    def restore(self, content: dict[str, Any]) -> None:
        """The state as it was when `content` was taken, by a model and an optimiser of the same settings.

        ValueError: it was taken of others.
        """
        try:
            self.model.load_state_dict(content["weights"])
            self.optimizer.load_state_dict(content["optimizer"])
            self.scaler.load_state_dict(content["scaler"])
            self.step, self.last, self.best = content["step"], content["last"], content["best"]
            self.finished, self.best_weights = content["finished"], content["best_weights"]
            if self.average:
                self.average.load_state_dict(content["average"])
                self.averaged = content["averaged"]
        except (KeyError, RuntimeError, ValueError, TypeError, AttributeError) as error:
            reason = " ".join(str(error).split("\n\t")[-1].split())  # the last of PyTorch's list
            raise ValueError(f"holds another run's state: it does not fit the model and optimiser ({reason})"
                             ) from error
        if self.best and not self.best_weights:
            self.remember_best()


def exists(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (NEWEST, PREVIOUS))


def write(folder: Path, content: dict[str, Any]) -> None:
    """`content` becomes the newest state and the one before the previous. OSError: not written; both are as before."""
    with replacing(folder / NEWEST, keep=folder / PREVIOUS) as file:
        careful = _Careful(file)
        torch.save({"format": FORMAT, **content}, careful)
        if careful.error:
            raise careful.error


def read(folder: Path) -> dict[str, Any]:
    """The newest sound state of a run's folder, its tensors in main memory; an older generation is said.

    ValueError: there is none. Nothing but tensors and plain values is taken from the file (`weights_only`).
    """
    problems = []
    for name in (NEWEST, PREVIOUS):
        try:
            content = _read(folder / name)
        except FileNotFoundError:
            problems.append(f"{name} is not there")
        except Exception as error:  # a damaged file makes PyTorch stumble over anything
            problems.append(f"{name} is damaged ({str(error).splitlines()[0][:100] or type(error).__name__})")
        else:
            if content.get("format") != FORMAT:
                raise ValueError(f"{folder / name} was written by another version of this toolkit (format "
                                 f"{content.get('format')}, here {FORMAT}): continue it with that one.")
            content["read_from"] = name
            if problems:
                log.warning("%s: %s; continuing from the state before, %s of step %d.", folder, problems[0], name,
                            content["step"])
            return content
    raise ValueError(f"{folder} has no state to continue from: {'; '.join(problems)}.")


def settle(folder: Path, content: dict[str, Any]) -> None:
    """After a fall-back removes the damaged newest state, whose place the next one takes: else it would push the sound
    one out."""
    if content["read_from"] == PREVIOUS:
        (folder / NEWEST).unlink(missing_ok=True)


def _read(path: Path) -> dict[str, Any]:
    with zipfile.ZipFile(path) as archive:
        if (damaged := archive.testzip()) is not None:  # torch.load itself checks no sums
            raise ValueError(f"wrong checksum of {damaged}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError("it holds other things than tensors and plain values") from error
    if not isinstance(content, dict) or "step" not in content:
        raise ValueError("it holds no state of a run")
    return content


@contextmanager
def replacing(path: Path, keep: Path | None = None) -> Iterator:
    """An open binary file that takes the place of `path` when all is written and has reached the disk, and else leaves
    no trace. keep: where the file that it replaces goes."""
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # the rename must not reach the disk before the bytes do
        if keep is not None and path.exists():
            os.replace(path, keep)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    with suppress(OSError):  # not every system lets a folder be synchronised
        handle = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def replacing_text(path: Path) -> Iterator[TextIO]:
    """`replacing` for text: UTF-8, names that are not (file systems allow them) as the bytes that they are."""
    with replacing(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="")
        yield text
        text.flush()
        text.detach()  # `replacing` has yet to bring it to the disk


class _Careful:
    """A file for torch.save, whose C++ writer must not meet an error (it ends the process): it is kept for later."""

    def __init__(self, file):
        self.file, self.error = file, None

    def write(self, data) -> int:
        if self.error is None:
            try:
                self.file.write(data)
            except OSError as error:
                self.error = error
        return len(data)

    def flush(self) -> None:
        pass
