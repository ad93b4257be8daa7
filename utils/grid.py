"""The runs of a table: run on the devices that are there, skipped where done, gone on with where cut off.

A folder a cell: that of a run of train.py, with `result.json` beside its files when it has ended. What a killed grid
has finished is read from there; what it had begun goes on (`--resume auto`).
"""

import ctypes
import json
import logging
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch
from tqdm import tqdm

from models import exchange
from utils import history
from utils.interrupt import EXIT, Interrupt
from utils.protocols import Cell, Option, Row
from utils.state import replacing

log = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parent.parent
RESULT, SPENT, LOG = "result.json", "seconds", "log.txt"
SPEAK = 60        # seconds between two signs of life
POLL = 0.3        # seconds between two looks at the processes
RETRY = 30.0      # seconds after which a cell that another process works on is looked at again
TAIL = 1 << 16    # bytes of metrics.jsonl that tell how fast a run is: more than a hundred steps
KEYS = {"flags", "choosing", "seed", "val", "last", "best_on_test", "checkpoint", "data", "resolved", "minutes"}
DIVERGED = re.compile(r"error: (Update \d+ was not made: .*)")  # train.py's last words
BUSY = "error: Another process is writing to "                  # likewise
LINUX = ctypes.CDLL(None) if sys.platform == "linux" else None
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Grid:
    """Rows, and where and how their cells are run."""

    rows: list[Row]
    folder: Path
    seeds: int
    common: tuple[str, ...] = ()  # words for every run of train.py: --data_dir, --device ...

    def path(self, cell: Cell) -> Path:
        return self.folder / cell.name

    def result(self, cell: Cell) -> dict | None:
        """What a cell brought; None: it is still to be done. ValueError: what is there is of another run."""
        file = self.path(cell) / RESULT
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise _damaged(file, str(error)) from error
        if not isinstance(found, dict) or not found.keys() >= KEYS:
            raise _damaged(file, "it lacks what a result has")
        if found["flags"] != _plain(cell.flags()):
            raise ValueError(f"{file.parent} holds another run than this table's: choose another --output_dir.")
        if not cell.choosing and not _is_number(found["last"]):
            raise _damaged(file, "it has no accuracy")
        return found

    def chosen(self, row: Row) -> Option | None:
        """The option of the largest accuracy on the held-out part, of equals the first; None: not all are done, or all
        have diverged (`blocked`)."""
        if len(row.options) == 1:
            return row.options[0]
        found = [self.result(cell) for cell in row.choosing()]
        if None in found:
            return None
        scored = [(option, result["val"]) for option, result in zip(row.options, found) if _is_number(result["val"])]
        return max(scored, key=lambda pair: pair[1])[0] if scored else None

    def blocked(self, row: Row) -> bool:
        """Whether there is nothing to choose: each candidate has ended, and none has an accuracy."""
        return self.chosen(row) is None and all(self.result(cell) for cell in row.choosing())

    def cells(self, row: Row) -> list[Cell]:
        """All cells of a row as far as they are known: the runs that count follow when an option is chosen."""
        option = self.chosen(row)
        return row.choosing() + (row.finals(option, self.seeds) if option else [])

    def finals(self, row: Row) -> list[dict]:
        """The results of a row's runs that count, as far as they are done. ValueError: its runs are not of the same
        data, checkpoint and precision."""
        found = [(cell, result) for cell in self.cells(row) if (result := self.result(cell))]
        first = {}
        for cell, result in found:
            if _is_number(result["last"]):  # else it has diverged and tells nothing
                seed = cell.seed if row.kept_back else 0  # which images are kept back follows from it
                for what, value in ((("checkpoint",), (result["checkpoint"] or {}).get("sha256")),
                                    (("precision",), (result["resolved"] or {}).get("precision")),
                                    (("data", cell.choosing, seed), result["data"])):
                    if first.setdefault(what, value) != value:
                        raise ValueError(f"{self.path(cell)} was run with another {what[0]} "
                                         "than the other runs of its row: remove it, and it is done again.")
        return [result for cell, result in found if not cell.choosing]

    def to_do(self, row: Row) -> list[Cell]:
        """What is still to be run of a row; where nothing is chosen yet, the runs that count are those of the longest
        option."""
        if self.blocked(row):
            return []
        option = self.chosen(row)
        finals = row.finals(option or max(row.options, key=lambda option: option.steps), self.seeds)
        return ([cell for cell in row.choosing() if not self.result(cell)]
                + [cell for cell in finals if not option or not self.result(cell)])

    def done(self) -> tuple[int, int]:
        """How many cells are done, of how many."""
        return (sum(self.result(cell) is not None for row in self.rows for cell in self.cells(row)),
                sum(len(row.choosing()) + self.seeds for row in self.rows))

    def command(self, cell: Cell) -> list[str]:
        words = [word for name, value in cell.flags().items() for word in _words(name, value)]
        return ["train.py", *words, *self.common, "--output_dir", str(self.folder), "--name", cell.name, "--resume",
                "auto", "--no_report"]


def _damaged(file: Path, why: str) -> ValueError:
    return ValueError(f"{file} is damaged ({why}): remove the folder, and its run is done again.")


def _is_number(value) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _plain(flags: dict) -> dict:
    """As JSON gives it back."""
    return json.loads(json.dumps(flags))


def _words(name: str, value) -> list[str]:
    if isinstance(value, bool):
        return [f"--{name}"] * value
    return [f"--{name}", str(value)]


# --- Running ---------------------------------------------------------------------------------------------------------

@dataclass
class Running:
    cell: Cell
    device: str
    process: subprocess.Popen
    log: Path
    start: int             # byte of the log where this attempt begins
    threads: int
    commit: str | None     # as it was when the process began
    began: float = field(default_factory=time.monotonic)

    def said(self) -> list[str]:
        with open(self.log, "rb") as file:
            file.seek(self.start)
            return file.read().decode(errors="replace").strip().splitlines() or ["nothing was said"]


@dataclass
class _Work:
    """The processes of a grid, one for each device, and what has become of its cells."""
    grid: Grid
    free: list[str]
    threads: int | None  # of a process on the CPU, where several share it
    running: list[Running] = field(default_factory=list)
    failed: list[Cell] = field(default_factory=list)
    later: dict[str, float] = field(default_factory=dict)  # name of a cell that another process works on: until when
    spoke: float = field(default_factory=time.monotonic)

    def turn(self) -> bool:
        """Ends what has ended, starts what can be started; False: there is nothing more to be done."""
        now = time.monotonic()
        for r in [r for r in self.running if r.process.poll() is not None]:
            self.running.remove(r)
            self.free.append(r.device)
            self._end(r)
        for cell in self._ready(now) if self.free else ():
            self.running.append(_start(self.grid, cell, self.free.pop(0), self.threads))
            if not self.free:
                break
        if self.running and time.monotonic() - self.spoke > SPEAK:
            self.spoke = time.monotonic()
            log.info("%d of %d cells are done; under way:", *self.grid.done())
            for r in self.running:
                log.info("%s: %s", r.cell.name, sign(self.grid.path(r.cell), r.cell.option.steps))
        return bool(self.running or any(moment > now for moment in self.later.values()))

    def _ready(self, now: float) -> list[Cell]:
        """The cells that can be started now, in the order of the rows."""
        out = [r.cell for r in self.running] + self.failed
        return [cell for row in self.grid.rows for cell in self.grid.cells(row) if cell not in out
                and self.later.get(cell.name, 0.0) <= now and self.grid.result(cell) is None]

    def _end(self, r: Running) -> None:
        if r.process.returncode and any(line.startswith(BUSY) for line in r.said()):
            if r.cell.name not in self.later:
                log.info("%s: another process is at work on it; looking again every %.0f s.", r.cell.name, RETRY)
            self.later[r.cell.name] = time.monotonic() + RETRY
        elif not _finish(self.grid, r):
            self.failed.append(r.cell)

    def stop(self, number: signal.Signals) -> None:
        """Has the processes save their states, and waits for their ends."""
        for r in self.running:
            r.process.send_signal(number)
        for r in self.running:
            r.process.wait()
            _spend(self.grid.path(r.cell), r)


def run(grid: Grid, devices: Sequence[str]) -> list[Cell]:
    """Runs what is not done, a process for each device ("" is the CPU, else a GPU's number); returns what failed: of a
    row whose candidates have all diverged, those.

    A signal is passed on: the runs save their states and end, and so does this process, with the signal's exit code. So
    they do, too, where this process ends of an error or (on Linux) is killed.
    """
    several = list(devices).count("")
    began, before = time.monotonic(), grid.done()[0]
    jobs = _Work(grid, list(devices), max(torch.get_num_threads() // several, 1) if several > 1 else None)
    with Interrupt() as interrupt:
        try:
            while interrupt.signal is None and jobs.turn():
                time.sleep(POLL)
        finally:
            jobs.stop(interrupt.signal or signal.SIGTERM)
    if interrupt.signal:
        log.info("%s: what was under way is saved; the same command goes on (%d cells finished in %.0f minutes).",
                 interrupt.signal.name, grid.done()[0] - before, (time.monotonic() - began) / 60)
        raise SystemExit(EXIT[interrupt.signal])
    blocked = [row for row in grid.rows if grid.blocked(row)]
    for row in blocked:
        log.error("%s: all of its %d candidates diverged, so nothing is chosen.", row.name, len(row.options))
    return jobs.failed + [cell for row in blocked for cell in row.choosing()]


def _start(grid: Grid, cell: Cell, device: str, threads: int | None) -> Running:
    environment = {**os.environ, **({"CUDA_VISIBLE_DEVICES": device} if device else {})}
    if threads and not device:
        environment.setdefault("OMP_NUM_THREADS", str(threads))
    asked = environment.get("OMP_NUM_THREADS", "")
    file = grid.folder / f"{cell.name}.{LOG}"
    file.parent.mkdir(parents=True, exist_ok=True)
    log.info("%s", cell.name)
    with open(file, "ab") as out:  # of its own session: a Ctrl-C reaches it once, through us
        start = file.stat().st_size
        process = subprocess.Popen([sys.executable, *grid.command(cell)], cwd=ROOT, env=environment, stdout=out,
                                   stderr=subprocess.STDOUT, start_new_session=True,
                                   preexec_fn=_end_with_parent if LINUX else None)
    return Running(cell, device, process, file, start, int(asked) if asked.isdigit() else torch.get_num_threads(),
                   commit())


def _end_with_parent() -> None:
    """In the new process: where this one is killed, and can tell nobody, the run is told to save its state and end."""
    LINUX.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _finish(grid: Grid, r: Running) -> bool:
    """Writes what an ended run brought; False, and said: it failed. A candidate that diverged is a result."""
    folder, code, lines = grid.path(r.cell), r.process.returncode, r.said()
    minutes = round(_spend(folder, r) / 60, 3)
    diverged = next((found[1] for line in lines if (found := DIVERGED.match(line))), None) if code else None
    try:
        if diverged and r.cell.choosing:
            result = {**dict.fromkeys(KEYS), "flags": _plain(r.cell.flags()), "choosing": True, "seed": r.cell.seed,
                      "diverged": diverged, "commit": r.commit}
        elif code:
            raise ValueError(f"exit code {code}): {lines[-1]}")
        else:
            result = outcome(grid, r)
    except (ValueError, OSError, KeyError, TypeError) as error:
        why = str(error) if code else f"it ended without the files of a whole run): {error}"
        log.error("%s failed (%s. All of it: %s", r.cell.name, why, r.log)
        return False
    folder.mkdir(exist_ok=True)
    with replacing(folder / RESULT) as file:
        file.write((json.dumps({**result, "minutes": minutes}, indent=1) + "\n").encode())
    for state in folder.glob("state*.pt"):  # a finished run needs them no more, and there are many cells
        state.unlink()
    part, value = ("val", result["val"]) if r.cell.choosing else ("test", result["last"])
    log.info("%s: %s, %.1f minutes", r.cell.name, f"{part} {100 * value:.2f} %" if value is not None else
             f"it diverged, and is not chosen ({diverged})" if diverged else "no accuracy", minutes)
    return True


def outcome(grid: Grid, r: Running) -> dict:
    """Scores of a run that has ended, as shares, and all that lets one trust or repeat it. ValueError, OSError,
    KeyError, TypeError: it has not left what a run leaves."""
    folder, cell = grid.path(r.cell), r.cell
    about, tests = exchange.read_metadata(folder / "last.safetensors"), history.read(folder).series
    accuracy, resolved = about["accuracy"], about["settings"]["resolved"]
    val, last = accuracy.get("val"), accuracy["test"]
    if not _is_number(last):
        raise ValueError("its weights have no accuracy on test")
    best = float(tests["test/accuracy"].values.max()) if "test/accuracy" in tests else last
    return {"flags": _plain(cell.flags()), "choosing": cell.choosing, "seed": cell.seed,
            "val": val if _is_number(val) else None, "last": last, "best_on_test": best,
            "command": shlex.join(["python", *grid.command(cell)]), "commit": r.commit,
            "versions": about["versions"], "checkpoint": about["finetuned_from"], "data": about["fingerprint"],
            "resolved": resolved, "hardware": hardware(resolved["device"], r.device, r.threads)}


def commit() -> str | None:
    """Of the toolkit, with "+" where files were changed since; None outside of a repository."""
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    try:
        return git("rev-parse", "HEAD") + "+" * bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.CalledProcessError):
        return None


def hardware(device: str = "", given: str = "", threads: int = 0) -> str:
    """What computes, in words. device: as a run says it ("cpu", "cuda:0"; "": what there is here); given: the only GPU
    that it saw, as `devices` names it; threads: of a run on the CPU."""
    if device.startswith("cuda") or (not device and torch.cuda.is_available()):
        return torch.cuda.get_device_name(_visible().index(given) if given else int(device.partition(":")[2] or 0))
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = "CPU"
    threads = threads or torch.get_num_threads()
    return f"{name}, {threads} thread{'s' * (threads > 1)}"


def sign(folder: Path, total: int) -> str:
    """Where a run is, in words: from the end of its metrics, which may be long."""
    times = {}
    if (file := folder / "metrics.jsonl").exists():
        with open(file, "rb") as lines:
            lines.seek(max(file.stat().st_size - TAIL, 0))
            for line in lines:
                try:
                    event = json.loads(line)
                    if event["name"] == "train/loss":
                        times[event["step"]] = event["time"]
                except (ValueError, TypeError, KeyError):  # half a line, at the beginning or the end
                    continue
    if not times:
        return f"no step of {total:,} yet"
    gaps = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in pairwise(sorted(times.items()))]
    where = f"step {max(times):,} of {total:,}"
    if not gaps:
        return where
    pace = median(gaps)  # not the mean, in which pauses for evaluations would count
    return f"{where}, {pace:.3g} s a step, {tqdm.format_interval(pace * (total - max(times)))} left"


def _spend(folder: Path, r: Running) -> float:
    """Seconds that the cell has taken so far, in all attempts; kept for the next one."""
    file = folder / SPENT
    try:
        before = float(file.read_text())
    except (OSError, ValueError):  # none, or damaged
        before = 0.0
    total = (before if 0 <= before < math.inf else 0.0) + time.monotonic() - r.began
    if folder.is_dir():
        with replacing(file) as out:
            out.write(f"{total:.1f}".encode())
    return total


def _visible() -> list[str]:
    """The GPUs that this process sees, as CUDA_VISIBLE_DEVICES names them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]


def devices(workers: int | None = None, cpu: bool = False) -> list[str]:
    """A process each: the visible GPUs by number, at most `workers`; without one, or with `cpu`, the CPU `workers`
    times. ValueError: there are to be none."""
    if workers is not None and workers < 1:
        raise ValueError(f"--workers is {workers}; it must be at least 1.")
    if cpu or not torch.cuda.is_available() or not _visible():
        return [""] * (workers or 1)
    return _visible()[:workers]
