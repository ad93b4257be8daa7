"""The folder of a run, `output/NAME/`: settings, state, self-explaining weights, a line of metrics an event."""

import errno
import hashlib
import json
import logging
import math
import os
import platform
import shutil
import time
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from models import exchange, lora
from models.tensors import record
from utils import state
from utils.settings import FREE
from utils.state import State, replacing

log = logging.getLogger(__name__)

WEIGHTS = ("last", "best", "averaged")  # files of weights that a run has, the third if it was asked for
FILES = ("settings.json", "metrics.jsonl", *(f"{kind}.safetensors" for kind in WEIGHTS), state.NEWEST, state.PREVIOUS,
         "predictions.csv", "report.html", "curves.csv", "curves.png", "tensorboard")  # of a run
PATHS = ("dataset", "labels", "data_dir")  # settings that say where data is
SAVE_SECONDS = 300  # between two savings of the state where nobody says how many updates


class Run:
    """An open run (a context): `log` values, `save` its state. A file is written whole or not at all, or appended to.

    about: what the header of its weights says besides scores: "settings", "classes", "finetuned_from" ... metrics: None
    for a new run, whose folder is cleared of another's files; else the bytes of metrics.jsonl that belong to the run's
    state, after which it goes on. writes: False in all processes but the first, which write nothing.
    ValueError: the folder cannot be made, or another process writes to it.
    """

    def __init__(self, folder: Path, about: dict, command: str, *, metrics: int | None = None, step: int = 0,
                 writes: bool = True):
        self.folder, self.about, self.command, self.writes = folder, about, command, writes
        self.started = time.monotonic()
        self.saved = self.started, step   # the last state: when, and after how many updates
        self.exported: dict[str, dict] = {}  # headers of the weights files
        if not writes:
            return
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and only runs need it
        kept = 0 if metrics is None else _kept(folder / "metrics.jsonl", metrics)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.metrics = open(folder / "metrics.jsonl", "a", encoding="utf-8", buffering=1)  # whole lines at once
        except OSError as error:
            raise ValueError(f"{folder} cannot be written to ({error.strerror}). Choose another "
                             "--output_dir.") from error
        try:
            _lock(self.metrics, folder)
            _clear(folder, everything=metrics is None)
            known = {**about["settings"], "where": about["where"], "command": command}
            with replacing(folder / "settings.json") as file:
                file.write((json.dumps(known, indent=2) + "\n").encode())
            self.metrics.truncate(kept)  # what was logged after the state was saved will be logged again
            self.tensorboard = SummaryWriter(folder / "tensorboard", purge_step=step + 1 if step else None)
            if not step:
                self._show_settings(about["settings"])
        except BaseException:
            self.metrics.close()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.writes:
            self.metrics.close()
            self.tensorboard.close()

    def log(self, step: int, **values: float) -> None:
        """Values after `step` updates; a name like train_loss is written as train/loss."""
        if not self.writes:
            return
        now = time.time()
        for name, value in values.items():
            name = name.replace("_", "/", 1)
            shown = value if math.isfinite(value) else None  # JSON has no NaN
            self.metrics.write(json.dumps({"step": step, "name": name, "value": shown, "time": round(now, 3)}) + "\n")
            self.tensorboard.add_scalar(name, value, step, walltime=now)

    def _show_settings(self, settings: dict) -> None:
        """TensorBoard's tab of hyper-parameters: what decides the run, as resolved, beside the scores, which it takes
        from the curves."""
        from torch.utils.tensorboard.summary import hparams
        effective = settings | settings.get("resolved", {})
        plain = {name: value if type(value) in (int, float) else str(value) for name, value in effective.items()
                 if name == "dataset" or name not in FREE | {"resolved", "fp16", "bf16"}}
        scores = ("train/loss", "val/accuracy", "test/accuracy", "test/loss", "best/test_accuracy")
        for summary in hparams(plain, dict.fromkeys(scores, 0.0)):
            self.tensorboard.file_writer.add_summary(summary)

    def show(self, name: str, images: np.ndarray, step: int) -> None:
        """(N, H, W, 3) uint8, as a square of pictures in TensorBoard."""
        from torchvision.utils import make_grid
        square = make_grid(torch.from_numpy(images).permute(0, 3, 1, 2), nrow=math.ceil(len(images) ** 0.5))
        self.tensorboard.add_image(name, square, step)

    def save(self, now: State, progress) -> None:
        """Writes the state, then the weights files that are behind it. OSError: the states before are as they were."""
        self.saved = time.monotonic(), now.step
        if not self.writes:
            return
        os.fsync(self.metrics.fileno())  # the lines of a state must not be lost where the state is not
        state.write(self.folder, {**now.content(), "progress": progress.state_dict(), "command": self.command,
                                  "about": self.about, "record": record(now.model, {}),
                                  "metrics": os.fstat(self.metrics.fileno()).st_size})
        for kind, header in self._headers(now).items():
            if self.exported.get(kind) != header and _has_weights(now, kind, header):
                self._export(kind, header, now)

    def save_is_due(self, step: int, every: int) -> bool:
        """After `every` updates, or where it is 0 after `SAVE_SECONDS`."""
        moment, saved = self.saved
        return step != saved and (step % every == 0 if every else time.monotonic() - moment > SAVE_SECONDS)

    def mend(self, now: State) -> None:
        """Brings the weights files in line with a state that was read; from a later step, damaged or lost, they are
        written again."""
        for kind, header in self._headers(now).items() if self.writes else ():
            known = _has_weights(now, kind, header)
            if self._on_disk(kind, now if known else None) == header:
                self.exported[kind] = header
                continue
            if not known:
                header = {"step": now.step, "command": self.command, "accuracy": {}}  # nobody has scored these
            log.info("%s.safetensors is written again, from the state.", kind)
            self._export(kind, header, now)

    def _headers(self, now: State) -> dict[str, dict]:
        """What of a weights file's header changes in a run."""
        headers = {}
        for kind, found in (("last", now.last), ("best", now.best), ("averaged", now.averaged)):
            if found:
                scores = {found["part"]: found, **({"test": now.finished[kind]} if now.finished else {})}
                headers[kind] = {"step": found["step"], "command": self.command, **{
                    name: {part: score[name] for part, score in scores.items()} for name in ("accuracy", "map")
                    if found[name] is not None}}
        return headers

    def _export(self, kind: str, header: dict, now: State) -> None:
        about = {name: value for name, value in self.about.items() if name != "where"}  # paths are for this machine
        exchange.save(now.model, self.folder / f"{kind}.safetensors", {**about, **header, "versions": versions()},
                      weights=_weights(kind, now))
        self.exported[kind] = header

    def _on_disk(self, kind: str, now: State | None) -> dict | None:
        """The header of a weights file as `_headers` has it; None: none, or other tensors than those of `now`."""
        path = self.folder / f"{kind}.safetensors"
        try:
            about = exchange.read_metadata(path)
            tensors = load_file(path) if now else {}
        except (ValueError, OSError, SafetensorError):
            return None
        weights = {} if now is None else _weights(kind, now)
        if tensors.keys() != weights.keys() or not all(torch.equal(tensors[name], value.cpu())
                                                       for name, value in weights.items()):
            return None
        return {name: about.get(name) for name in ("step", "command", "accuracy", "map") if name in about}


def _weights(kind: str, now: State) -> dict[str, torch.Tensor]:
    """What a weights file holds, by our names."""
    if kind == "averaged":
        return now.average.model.state_dict()
    return lora.merged(now.model, now.best_weights if kind == "best" else None)


def _has_weights(now: State, kind: str, header: dict) -> bool:
    """Whether the state has the weights that a header describes: all but `best` only until the next update."""
    return kind == "best" or header["step"] == now.step


def _kept(path: Path, wanted: int) -> int:
    """How many bytes of metrics.jsonl to keep: as many as wanted, or its whole lines where some are lost."""
    there = path.read_bytes() if path.exists() else b""
    if len(there) >= wanted:
        return wanted
    log.warning("%s has lost its end (%d of %d bytes are there): it goes on with a gap.", path, len(there), wanted)
    return there.rfind(b"\n") + 1


def _clear(folder: Path, everything: bool) -> None:
    """Removes what a process that was killed had half written; `everything`: also the files of the run before."""
    names = [f"{name}.part" for name in FILES] + [name for name in FILES if everything and name != "metrics.jsonl"]
    for path in (folder / name for name in names):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _lock(file, folder: Path) -> None:
    """ValueError: another process holds the run. The lock ends with the process, however that ends; its workers have
    no part in it (as they would with `flock`)."""
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise ValueError(f"Another process is writing to {folder}. Wait for its end, or choose another "
                         "--name.") from None
    except OSError:  # a file system without locks
        return


def full(error: OSError) -> str | None:
    """A sentence, where the error says that there is no room left for what a run writes; else None."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return None
    return (f"There is no room for the run's files any more ({os.strerror(error.errno)}). The last saved state "
            "is whole: make room, then continue with --resume.")


def check_free(folder: Path, overwrite: bool) -> None:
    """ValueError: the folder holds a run already, or is a file."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; the run's folder would go there. Choose another --name.")
    if not overwrite and any((folder / name).exists() for name in FILES):
        raise ValueError(f"{folder} holds a run already. Continue it with --resume {folder}, choose another --name, or "
                         "--overwrite it.")


def weights_of(path, kind: str = "auto") -> Path:
    """The weights in a run's folder; any other path as it is.

    kind: "best", "last", "averaged", or "auto": `best` where a held-out part has chosen it, else `last`, as the test
    set itself has chosen `best` there. ValueError: a run that has saved no weights yet.
    """
    path = Path(path)
    if path.name in (state.NEWEST, state.PREVIOUS):
        raise ValueError(f"{path} is the state of a run; for its weights give the run's folder, {path.parent}.")
    if not (path / "settings.json").is_file():
        return path
    if kind == "auto":
        last = path / "last.safetensors"
        chosen = last.exists() and "val" in exchange.read_metadata(last).get("accuracy", {})
        kind = "best" if chosen else "last"
    if kind == "averaged" and not (path / f"{kind}.safetensors").exists():
        raise ValueError(f"{path} has no averaged.safetensors: it was trained without --ema or --swa, or has averaged "
                         "nothing yet.")
    if not (path / f"{kind}.safetensors").exists():
        raise ValueError(f"{path} is a run without {kind}.safetensors: it has had no evaluation yet. Let it go on "
                         f"to one: python train.py --resume {path} --eval_every N.")
    return path / f"{kind}.safetensors"


def data_of(settings: dict, where: dict) -> dict[str, str | None]:
    """Where the data of a run is, by PATHS: at its absolute path, else where the path that was given leads from here (a
    project that moved as a whole).

    settings, where: as `settings.json` and the state have them.
    """
    found = {}
    for name in PATHS:
        absolute, given = where.get(name), settings.get(name)
        moved = absolute and given and not Path(absolute).exists() and Path(given).exists()
        found[name] = given if moved else absolute or given
    return found


def versions() -> dict[str, str]:
    """Of what decides numbers; torchvision's without the second that its import takes."""
    return {"python": platform.python_version(), "torch": torch.__version__,
            **{name: metadata.version(name) for name in ("torchvision", "numpy")}}


def sha256(path: Path) -> str:
    digest = hashlib.sha256()  # hashlib.file_digest is newer than Python 3.10
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
