"""The folder of a run, `output/NAME/`: settings, weights that explain themselves, one line of metrics an event."""

import hashlib
import json
import math
import os
import platform
import shutil
import time
from pathlib import Path

import numpy as np
import torch
import torchvision

from models import exchange

FILES = ("settings.json", "metrics.jsonl", "best.safetensors", "last.safetensors", "tensorboard")  # of a run


class Run:
    """An open run (a context): `log` values, `save` weights. A file is written whole or not at all, or appended to."""

    def __init__(self, folder: Path, settings: dict, command: str):
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and only runs need it
        self.folder, self.command = folder, command
        self.started = time.time()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"{folder} cannot be made ({error.strerror}). Choose another --output_dir.") from error
        for name in FILES:
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        _write(folder / "settings.json", json.dumps({**settings, "command": command}, indent=2) + "\n")
        self.metrics = open(folder / "metrics.jsonl", "a", encoding="utf-8", buffering=1)  # whole lines at once
        self.tensorboard = SummaryWriter(folder / "tensorboard")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.metrics.close()
        self.tensorboard.close()

    def log(self, step: int, **values: float) -> None:
        """Values after `step` updates; a name like train_loss is written as train/loss."""
        now = time.time()
        for name, value in values.items():
            name = name.replace("_", "/", 1)
            shown = value if math.isfinite(value) else None  # JSON has no NaN
            self.metrics.write(json.dumps({"step": step, "name": name, "value": shown, "time": round(now, 3)}) + "\n")
            self.tensorboard.add_scalar(name, value, step, walltime=now)

    def save(self, kind: str, model, **metadata) -> Path:
        """Writes `best` or `last`: weights, and in the header all that is needed to use them (`models/exchange.py`)."""
        path = self.folder / f"{kind}.safetensors"
        exchange.save(model, path, {**metadata, "command": self.command, "versions": versions()})
        return path


def check_free(folder: Path, overwrite: bool) -> None:
    """ValueError: the folder holds a run already, or is a file."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; the run's folder would go there. Choose another --name.")
    if not overwrite and any((folder / name).exists() for name in FILES):
        raise ValueError(f"{folder} holds a run already. Choose another --name, or --overwrite it.")


def weights_of(path, kind: str = "auto") -> Path:
    """The weights in a run's folder; any other path as it is.

    kind: "best", "last", or "auto": `best` where a held-out part has chosen it, else `last`, as the test set itself has
    chosen `best` there. ValueError: a run that has saved no weights yet.
    """
    path = Path(path)
    if not (path / "settings.json").is_file():
        return path
    if kind == "auto":
        last = path / "last.safetensors"
        chosen = last.exists() and "val" in exchange.read_metadata(last).get("accuracy", {})
        kind = "best" if chosen else "last"
    if not (path / f"{kind}.safetensors").exists():
        raise ValueError(f"{path} is a run without {kind}.safetensors: it has had no evaluation yet.")
    return path / f"{kind}.safetensors"


def _write(path: Path, text: str) -> None:
    """Writes the whole file or leaves it as it was."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), "torch": torch.__version__, "torchvision": torchvision.__version__,
            "numpy": np.__version__}


def sha256(path: Path) -> str:
    digest = hashlib.sha256()  # hashlib.file_digest is newer than Python 3.10
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
