"""How many micro-batches an update is cut into: as many as asked for, or as few as fit into memory, found by an
estimate (CPU) or by trying (GPU), and more of them where memory runs out on the way."""

import gc
import logging
from collections.abc import Callable
from contextlib import contextmanager
from typing import TypeVar

import torch

from utils import resources
from utils.distributed import World
from utils.resources import amount, out_of_memory

log = logging.getLogger(__name__)
Result = TypeVar("Result")

GPU_SHARE = 0.92  # of a GPU's memory that an update may take: the rest is for what its allocator cannot fill
CPU_SHARE = 0.5   # of free main memory; nothing is tried there, as who takes too much is killed without a word
ONE_IMAGE = ("The memory is full with one image at a time. Try a smaller --img_size, --gradient_checkpointing, a "
             "smaller model or --precision bf16.")


class Fitting:
    """Into how many micro-batches (`parts`) each process cuts its images of an update; part of a run's state.

    automatic: more where memory runs out. Otherwise the number was given by hand, and the error stays one.
    settled: False where `parts` is an estimate that is still to be tried. devices, processes: what it was found for.
    """

    def __init__(self, parts: int = 1, *, automatic: bool = False, settled: bool = True, devices: str = "",
                 processes: int = 1):
        self.parts, self.automatic, self.settled = parts, automatic, settled
        self.devices, self.processes = devices, processes
        self.agreed = parts  # among the processes

    def state_dict(self) -> dict:
        return {"micro_batches": self.parts, "devices": self.devices, "processes": self.processes}

    def run(self, work: Callable[[int], Result], clear: Callable[[], None], images: int, step: int) -> Result:
        """`work(parts)`; where memory runs out, `clear` and the same again with more parts.

        images: of this process. ValueError: not even one image at a time fits.
        """
        while True:
            try:
                return work(self.parts)
            except (RuntimeError, MemoryError) as error:
                if not (self.automatic and out_of_memory(error)):
                    raise
            # Not in the `except`, in which the traceback would keep what the attempt had made.
            clear()
            give_back()
            before, self.parts = self.parts, finer(self.parts, images)
            log.warning("step %d: the memory was full; this step is done again, and from here on an update is cut into "
                        "%d micro-batches instead of %d (with dropout: with other masks).", step, self.parts, before)

    @property
    def changed(self) -> bool:
        """Whether this process cuts finer than the others know: each may do so alone in the midst of an update."""
        return self.parts != self.agreed

    def agree(self, world: World) -> None:
        """All processes cut as finely as the one that has to most, so that one number is the state of the run."""
        before, self.parts = self.parts, max(world.gather(self.parts))
        self.agreed = self.parts
        if self.parts > before:
            log.warning("The memory of another process was full: from here on an update is cut into %d micro-batches "
                        "instead of %d.", self.parts, before)

    def settle(self, rehearse: Callable[[int], None], images: int, device: torch.device, world: World) -> None:
        """On a GPU: the fewest parts with which an update really fits, in every process; says which.

        rehearse: takes the memory of an update of so many parts, and gives it back. ValueError: one image at a time
        does not fit somewhere.
        """
        if self.settled:
            return
        peaks = {}

        def fits(parts: int) -> bool:
            give_back()
            torch.cuda.reset_peak_memory_stats(device)
            try:
                rehearse(parts)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                return False
            peaks[parts] = torch.cuda.max_memory_allocated(device)
            return peaks[parts] <= GPU_SHARE * resources.room(device)
        found = world.gather(fewest(divisors(images), fits, self.parts))
        give_back()
        torch.cuda.reset_peak_memory_stats(device)
        if None in found:
            raise ValueError(ONE_IMAGE)
        self.parts = self.agreed = max(found)
        self.settled = True
        peak = f", taking {amount(peaks[self.parts])} of" if self.parts in peaks else " into"
        log.info("%-8s %s (auto: as few as fit%s %s)", "split", in_words(images * world.size, self.parts), peak,
                 amount(resources.room(device)))


def begin(settings, saved: dict, model, precision: torch.dtype, device: torch.device, world: World) -> Fitting:
    """The split with which a run starts: as asked for; with `auto` the one that it was saved with, as long as it runs
    on the same devices, else by the estimate.

    saved: its `state_dict`; empty: a new run, or a split that is to be found anew.
    """
    asked = settings.gradient_accumulation_steps
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    devices = ", ".join(sorted(set(world.gather(name))))
    here = dict(devices=devices, processes=world.size)
    images = max(settings.train_batch_size // world.size, 1)
    if asked != "auto":
        if images % asked:
            raise ValueError(f"Each of the {world.size} processes has {images} of the {settings.train_batch_size} "
                             f"images of an update: they cannot be cut into {asked} equal micro-batches.")
        return Fitting(asked, **here)
    if saved and {**saved, **here} == saved:
        return Fitting(saved["micro_batches"], automatic=True, **here)
    if device.type == "cuda":
        free = GPU_SHARE * resources.room(device)
    else:
        free = resources.free_memory(device)  # all processes of one machine share it
        free = float("inf") if free is None else CPU_SHARE * free / world.size

    def fits(parts: int) -> bool:
        return resources.memory(model, settings, precision, device, world.size, parts).total <= free
    parts = next((n for n in divisors(images) if fits(n)), images)
    return Fitting(max(world.gather(parts)), automatic=True, settled=device.type != "cuda", **here)


def in_words(batch: int, parts: int) -> str:
    """A global batch and how it is cut."""
    return f"{batch} in {parts} micro-batches of {batch // parts}" if parts > 1 else f"{batch} at once"


def divisors(images: int) -> list[int]:
    """The numbers of equal parts that so many images can be cut into, ascending."""
    return [n for n in range(1, images + 1) if images % n == 0]


def finer(parts: int, images: int) -> int:
    """The next number of parts, at least twice as many. ValueError: each part has one image already."""
    found = next((n for n in divisors(images) if n >= 2 * parts), None)
    if found is None:
        raise ValueError(ONE_IMAGE)
    return found


def fewest(candidates: list[int], fits: Callable[[int], bool], guess: int) -> int | None:
    """The first of the ascending candidates that fits, as then all after it do; None: none. Looked for from `guess` on,
    in both directions, as failures far from it take time."""
    at = candidates.index(guess)
    if not fits(guess):
        return next((n for n in candidates[at + 1:] if fits(n)), None)
    while at and fits(candidates[at - 1]):
        at -= 1
    return candidates[at]


@contextmanager
def meeting(several: bool, parts: int, images: int):
    """Around what no process of several can do again by itself, as the others wait in it for its gradients.

    ValueError: the memory was full there; with the split to go on with.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not (several and out_of_memory(error)):
            raise
        raise ValueError("The memory is full in the part of a step that cannot be done again, as the processes wait "
                         "for one another. The last saved state is whole: continue with --resume FOLDER "
                         f"--gradient_accumulation_steps {finer(parts, images)}.") from error


def give_back() -> None:
    """Frees what nothing refers to any more, also to the GPU."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
