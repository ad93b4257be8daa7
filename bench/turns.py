"""Processes that take turns: each does one round of its work when it is told, and sleeps while the others do theirs.

A worker reads lines on its standard input, does one round for each, and answers with one line of JSON, which holds
"seconds" and "images". Its first line, unasked, says that it is ready (or what it failed with). What slows the machine
for a minute slows all contestants, so the ratio of two rounds says more than either.
"""

import json
import os
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple


class Job(NamedTuple):
    """What one contestant does in a round (`bench/contestants.py`). It travels as JSON."""
    contestant: str
    task: str                      # forward, step, loop, evaluation or augmentation
    model: str = "ViT-B_16"
    size: int = 224                # pixels
    precision: str = "float32"     # bfloat16, float16; auto: what ours chooses
    batch: int = 8                 # images
    count: int = 1                 # steps or batches a round
    device: str = "cpu"
    data: str = ""                 # the folder of images, for all tasks but forward and step
    compiled: bool = False         # by torch.compile
    as_it_comes: bool = False      # timm's loop with all of its own defaults, not with our crops
    micro_batches: int = 1         # to start with: more where the memory is full
    dropout: float | None = 0.0    # of ours; None: the published rate
    memory: float = 0.0            # GB of a GPU's memory that may be used; 0: all


class Failure(NamedTuple):
    kind: str    # one word, for a cell
    reason: str


@dataclass
class Outcome:
    """What a contestant did: its answers to the rounds in order, and why there are no more."""
    about: dict = field(default_factory=dict)  # its first line
    rounds: list[dict] = field(default_factory=list)
    failure: Failure | None = None

    def of(self, what: str) -> list:
        return [done[what] for done in self.rounds]

    def images_per_second(self) -> float:
        """The median over the rounds."""
        return statistics.median(done["images"] / done["seconds"] for done in self.rounds)


class Stopped(Exception):
    """A worker has no answer: Failure."""


class Worker:
    """A process at the other end of two pipes. What it writes on its standard error is kept: it may tell of a fault."""

    def __init__(self, command: list[str]):
        self.errors = tempfile.TemporaryFile()
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors,
                                        bufsize=0, start_new_session=True)
        self.received = b""

    def ask(self) -> None:
        with suppress(BrokenPipeError):  # it has ended; `answer` finds out how
            self.process.stdin.write(b"go\n")

    def answer(self, timeout: float) -> dict:
        """Its next line. Stopped: it says that it failed, has ended, or has not said a word in so many seconds."""
        until = time.monotonic() + timeout
        while b"\n" not in self.received:
            left = until - time.monotonic()
            if left <= 0 or not select.select([self.process.stdout], [], [], left)[0]:
                raise Stopped(Failure("timeout", f"no answer in {timeout:.0f} s"))
            part = os.read(self.process.stdout.fileno(), 1 << 16)
            if not part:
                raise Stopped(Failure("died", f"exit code {self.process.wait()}: {self.last_words()}"))
            self.received += part
        line, _, self.received = self.received.partition(b"\n")
        said = json.loads(line)
        if "failure" in said:
            raise Stopped(Failure(*said["failure"]))
        return said

    def last_words(self) -> str:
        self.errors.seek(0)
        lines = self.errors.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"

    def close(self) -> None:
        """Ends it, with the processes that it has started; there is nothing that they should save."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, 9)  # its own session: nobody else is in it
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()
        self.errors.close()


def race(commands: dict[str, list[str]], rounds: int, *, timeout: float = 600, until: float | None = None,
         together: bool = False, tell: Callable[[str], None] = lambda text: None) -> dict[str, Outcome]:
    """One warm-up and so many rounds of each command in turn; every second time in the opposite order, so that
    nobody always comes first.

    timeout: seconds for an answer. until: the moment (time.monotonic) after which nothing is asked any more; rounds
    made by then count. together: all warm up at once, for what is long and not measured. tell: said before each turn.
    """
    until = float("inf") if until is None else until
    outcomes, workers = {name: Outcome() for name in commands}, {}

    def take(name: str) -> dict | None:
        """The worker's next answer; it is out when there is none."""
        try:
            return workers[name].answer(max(min(timeout, until - time.monotonic()), 0.01))
        except Stopped as stopped:
            failure = stopped.args[0]
            late = failure.kind == "timeout" and time.monotonic() >= until
            if not late:
                outcomes[name].failure = failure
            elif not outcomes[name].rounds:
                outcomes[name].failure = Failure("late", "its time was over before its first round")
            workers.pop(name).close()
        return None

    try:
        for name, command in commands.items():
            workers[name] = Worker(command)
        for name in commands:
            tell(f"{name} starts")
            outcomes[name].about = take(name) or {}
        warm = list(workers)
        if together:
            for name in warm:
                workers[name].ask()
        for name in warm:
            tell(f"{name} warms up")
            if not together:
                workers[name].ask()
            take(name)
        for number in range(rounds):
            for name in list(workers)[::1 if number % 2 == 0 else -1]:
                tell(f"{name}, round {number + 1} of {rounds}")
                workers[name].ask()
                done = take(name)
                if done is not None:
                    outcomes[name].rounds.append({"round": number, **done})
    finally:
        for worker in workers.values():
            worker.close()
    return outcomes


def ratios(peer: Outcome, ours: Outcome) -> list[float]:
    """Seconds an image of the peer over ours, round by round; above 1: ours is faster."""
    mine = {done["round"]: done["seconds"] / done["images"] for done in ours.rounds}
    return [done["seconds"] / done["images"] / mine[done["round"]] for done in peer.rounds if done["round"] in mine]


# --- in the worker ----------------------------------------------------------------------------------------------------

def only_answers() -> Callable[..., None]:
    """Keeps this process's standard output for its answers: whatever else is printed goes to the standard error."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(**what) -> None:
        print(json.dumps(what), file=channel, flush=True)
    return answer


def serve(prepare: Callable[[], tuple[dict, Callable[[], dict]]]) -> None:
    """A worker's life. prepare() gives what it says of itself, and the function that does a round."""
    answer = only_answers()
    try:
        about, do_round = prepare()
        answer(**about)
        for _ in sys.stdin:
            answer(**do_round())
    except Exception as error:  # of whatever library: it becomes a cell
        kind = {"ModuleNotFoundError": "absent", "ImportError": "absent", "OutOfMemoryError": "memory",
                "NotImplementedError": "none", "FloatingPointError": "diverged"}.get(type(error).__name__, "failed")
        answer(failure=[kind, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"])
        raise SystemExit(1) from error
