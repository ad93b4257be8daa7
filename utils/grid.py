"""The runs of a table: priced, run on the devices that are there, skipped where done, gone on with where cut off.

A folder a cell: that of a run of train.py, with `result.json` beside its files when it has ended. What a killed grid
has finished is read from there; what it had begun goes on (`--resume auto`).
"""

import json
import logging
import os
import shlex
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from models import exchange
from utils import history
from utils.interrupt import EXIT, Interrupt
from utils.protocols import Cell, Option, Row
from utils.resources import amount
from utils.state import replacing

log = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parent.parent
RESULT, SPENT, LOG = "result.json", "seconds", "log.txt"
SPEAK = 60        # seconds between two signs of life
POLL = 0.3        # seconds between two looks at the processes
START = 10.0      # seconds that a run takes before its first step: a guess
EVALUATION = 1 / 3  # of the work on an image in training: forwards only


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
            raise ValueError(f"{file} is damaged ({error}): remove the folder, and its run is done again.") from error
        if found["flags"] != _plain(cell.flags()):
            raise ValueError(f"{file.parent} holds another run than this table's: choose another --output_dir.")
        return found

    def chosen(self, row: Row) -> Option | None:
        """The option of the largest accuracy on the held-out part, of equals the first; None: not all are done."""
        if len(row.options) == 1:
            return row.options[0]
        found = [self.result(cell) for cell in row.choosing()]
        if None in found:
            return None
        return max(zip(row.options, found), key=lambda pair: pair[1]["val"])[0]

    def cells(self, row: Row) -> list[Cell]:
        """All cells of a row as far as they are known: the runs that count follow when an option is chosen."""
        option = self.chosen(row)
        return row.choosing() + (row.finals(option, self.seeds) if option else [])

    def finals(self, row: Row) -> list[dict]:
        """The results of a row's runs that count, as far as they are done."""
        option = self.chosen(row)
        found = [self.result(cell) for cell in row.finals(option, self.seeds)] if option else []
        return [result for result in found if result]

    def command(self, cell: Cell) -> list[str]:
        words = [word for name, value in cell.flags().items() for word in _words(name, value)]
        return ["train.py", *words, *self.common, "--output_dir", str(self.folder), "--name", cell.name, "--resume",
                "auto", "--no_report"]


def _plain(flags: dict) -> dict:
    """As JSON gives it back."""
    return json.loads(json.dumps(flags))


def _words(name: str, value) -> list[str]:
    if isinstance(value, bool):
        return [f"--{name}"] * value
    return [f"--{name}", str(value)]


def shard(rows: Sequence[Row], costs: Sequence[float], part: int, parts: int) -> list[Row]:
    """The rows of machine `part` of 1 ... `parts`, about equally dear, each row on one machine: its cells need one
    another's results. The same on all machines for the same costs."""
    loads, mine = [0.0] * parts, []
    for cost, number in sorted(((cost, number) for number, cost in enumerate(costs)), key=lambda c: (-c[0], c[1])):
        least = loads.index(min(loads))
        loads[least] += cost
        if least == part - 1:
            mine.append(number)
    return [rows[number] for number in sorted(mine)]


# --- The price -------------------------------------------------------------------------------------------------------

class Price(NamedTuple):
    """Of a row: of all of its cells, done or not."""
    cells: int
    images: int      # that are trained on
    seconds: float   # on one device
    disk: int        # bytes


def price(row: Row, seeds: int, images: tuple[int, int], rate: float, weights: int) -> Price:
    """images: of train and test; rate: images a second in training, measured or derived; weights: bytes of a file."""
    train, test = images
    seconds = trained = 0
    cells = row.choosing() + row.finals(max(row.options, key=lambda option: option.steps), seeds)
    for cell in cells:
        steps = cell.option.steps
        scored = -(-steps // (row.eval_every or steps)) * (int(row.held_out * train) if cell.choosing else test)
        scored += test if cell.choosing else 0  # at its end a run scores the test part, whatever it is for
        trained += steps * row.batch
        seconds += START + (steps * row.batch + scored * EVALUATION) / rate
    # Of a finished run the weights stay, `last` and `best`; of one that is under way two generations of its state, too.
    return Price(len(cells), trained, seconds, len(cells) * 2 * weights + 9 * weights)


# --- Running ---------------------------------------------------------------------------------------------------------

@dataclass
class Running:
    cell: Cell
    process: subprocess.Popen
    log: Path
    began: float = field(default_factory=time.monotonic)


def run(grid: Grid, devices: Sequence[str]) -> list[Cell]:
    """Runs what is not done, a process for each device ("" is the CPU, else a GPU's number); returns what failed.

    A signal is passed on: the runs save their states and end, and so does this process, with the signal's exit code.
    """
    failed, free, running = [], list(devices), []
    spoke, began, done = time.monotonic(), time.monotonic(), 0
    with Interrupt() as interrupt:
        while interrupt.signal is None:
            waiting = _ready(grid, [r.cell for _, r in running], failed) if free else ()
            while free and waiting:
                cell, device = waiting.popleft(), free.pop(0)
                running.append((device, _start(grid, cell, device)))
            if not running:
                return failed
            time.sleep(POLL)
            for device, r in [pair for pair in running if pair[1].process.poll() is not None]:
                running.remove((device, r))
                free.append(device)
                done += 1
                if not _finish(grid, r):
                    failed.append(r.cell)
            if time.monotonic() - spoke > SPEAK:
                spoke = time.monotonic()
                for _, r in running:
                    log.info("%s: %s", r.cell.name, _last_line(r.log))
        for _, r in running:
            r.process.send_signal(interrupt.signal)
        for _, r in running:
            r.process.wait()
            _spend(grid.path(r.cell), r)
    log.info("%s: what was under way is saved; the same command goes on (%d cells finished in %.0f minutes).",
             interrupt.signal.name, done, (time.monotonic() - began) / 60)
    raise SystemExit(EXIT[interrupt.signal])


def _ready(grid: Grid, running: list[Cell], failed: list[Cell]) -> deque[Cell]:
    """The cells that can be started now, in the order of the rows."""
    return deque(cell for row in grid.rows for cell in grid.cells(row)
                 if cell not in running and cell not in failed and grid.result(cell) is None)


def _start(grid: Grid, cell: Cell, device: str) -> Running:
    environment = {**os.environ, **({"CUDA_VISIBLE_DEVICES": device} if device else {})}
    file = (grid.folder / f"{cell.name}.{LOG}")
    file.parent.mkdir(parents=True, exist_ok=True)
    log.info("%s", cell.name)
    with open(file, "ab") as out:  # of its own session: a Ctrl-C reaches it once, through us
        process = subprocess.Popen([sys.executable, *grid.command(cell)], cwd=ROOT, env=environment, stdout=out,
                                   stderr=subprocess.STDOUT, start_new_session=True)
    return Running(cell, process, file)


def _finish(grid: Grid, r: Running) -> bool:
    """Writes what an ended run brought; False, and said: it failed."""
    folder = grid.path(r.cell)
    if r.process.returncode:
        log.error("%s failed (exit code %d): %s. All of it: %s", r.cell.name, r.process.returncode, _last_line(r.log),
                  r.log)
        return False
    result = {**outcome(grid, r.cell), "minutes": round(_spend(folder, r) / 60, 3)}
    with replacing(folder / RESULT) as file:
        file.write((json.dumps(result, indent=1) + "\n").encode())
    for state in folder.glob("state*.pt"):  # a finished run needs them no more, and there are many cells
        state.unlink()
    part = f"val {100 * result['val']:.2f} %" if r.cell.choosing else f"test {100 * result['last']:.2f} %"
    log.info("%s: %s, %.1f minutes", r.cell.name, part, result["minutes"])
    return True


def outcome(grid: Grid, cell: Cell) -> dict:
    """Scores of a run that has ended, as shares, and all that lets one trust or repeat it."""
    folder = grid.path(cell)
    about, tests = exchange.read_metadata(folder / "last.safetensors"), history.read(folder).series
    accuracy = about["accuracy"]
    best = float(tests["test/accuracy"].values.max()) if "test/accuracy" in tests else accuracy["test"]
    return {"flags": _plain(cell.flags()), "choosing": cell.choosing, "seed": cell.seed, "val": accuracy.get("val"),
            "last": accuracy["test"], "best_on_test": best, "command": shlex.join(["python", *grid.command(cell)]),
            "commit": commit(), "versions": about["versions"], "checkpoint": about["finetuned_from"],
            "data": about["fingerprint"], "resolved": about["settings"]["resolved"], "hardware": hardware()}


def commit() -> str | None:
    """Of the toolkit, with "+" where files were changed since; None outside of a repository."""
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    try:
        return git("rev-parse", "HEAD") + "+" * bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.CalledProcessError):
        return None


def hardware() -> str:
    """What computes, in words."""
    import torch
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = "CPU"
    return f"{name}, {torch.get_num_threads()} threads"


def _spend(folder: Path, r: Running) -> float:
    """Seconds that the cell has taken so far, kept for a run that is gone on with."""
    file = folder / SPENT
    before = float(file.read_text()) if file.exists() else 0.0
    total = before + time.monotonic() - r.began
    if folder.is_dir():
        file.write_text(f"{total:.1f}")
    return total


def _last_line(file: Path) -> str:
    lines = file.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else "nothing said yet"


def devices(workers: int | None = None) -> list[str]:
    """The visible GPUs by number, or the CPU: a process each; at most `workers`."""
    import torch
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
    found = names if torch.cuda.is_available() and names else [""]
    return found[:workers] if workers else found


def said(prices: Sequence[Price], count: int) -> str:
    """The sum of prices in words, on so many devices."""
    seconds = sum(p.seconds for p in prices) / max(count, 1)
    hours = f"{seconds / 3600:,.1f} hours" if seconds > 5400 else f"{seconds / 60:.0f} minutes"
    return (f"{sum(p.cells for p in prices):,} runs, {sum(p.images for p in prices) / 1e6:,.1f} M training images, "
            f"about {hours} on {count} device{'s' * (count > 1)}, {amount(sum(p.disk for p in prices))} of disk")
