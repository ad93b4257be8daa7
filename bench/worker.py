"""One contestant in a process of its own: `python bench/worker.py JOB`, a `turns.Job` as JSON; see `bench/turns.py`.

Times are of whole rounds, the device having finished before and after. A step's memory is the highest resident set
(ru_maxrss) less that after the imports, on a GPU the most that was allocated.
"""

import json
import math
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch

from bench.contestants import CONTESTANTS, VIEWS, Contestant
from bench.hardware import forward_flops
from bench.load import mark
from bench.turns import Job, serve


class Meter:
    """The device's clock and memory."""

    def __init__(self, device: str):
        self.cuda = device == "cuda"
        self.start = mark()[1]

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def peak(self) -> int:
        """Bytes since the imports."""
        return torch.cuda.max_memory_allocated() if self.cuda else mark()[1] - self.start

    def rest(self) -> None:
        """Leaves the GPU's memory to the others."""
        if self.cuda:
            torch.cuda.empty_cache()


def given_batch(job: Job, classes: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (B, 3, S, S) in [-1, 1] and labels (B,), the same for all contestants."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(job.batch, 3, job.size, job.size, generator=generator) * 2 - 1
    return images.to(device), torch.randint(classes, (job.batch,), generator=generator).to(device)


def step_that_fits(contestant: Contestant, images, labels) -> torch.Tensor:
    """A step in as many micro-batches as the memory asks for: twice as many after each time that it was full."""
    while True:
        try:
            return contestant.step(images, labels)
        except torch.OutOfMemoryError:
            if 2 * contestant.micro_batches > len(images):
                raise
        contestant.optimizer.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        contestant.micro_batches *= 2


def tasks(contestant: Contestant) -> tuple[Callable, Callable, list]:
    """Of a task: what a GPU does before the clock starts, a round (it tells how many images it has seen), and where the
    round leaves its last loss."""
    job, loss = contestant.job, []
    images, labels = given_batch(job, contestant.classes, contestant.device)

    @torch.inference_mode()
    def forward(count: int = job.count) -> int:
        with contestant.autocast():
            for _ in range(count):
                contestant.logits(images)
        return count * job.batch

    def step(count: int = job.count) -> int:
        for _ in range(count):
            loss[:] = [step_that_fits(contestant, images, labels)]
        return count * job.batch

    def loop() -> int:
        seen = 0
        for batch in contestant.stream():
            loss[:] = [step_that_fits(contestant, *batch)]
            seen += len(batch[1])
        return seen

    if job.task in ("forward", "evaluation"):
        contestant.model.eval()
        return partial(forward, 1), forward if job.task == "forward" else contestant.evaluate, loss
    return partial(step, 1), step if job.task == "step" else loop, loss


def load_late_parts() -> None:
    """Makes PyTorch import what it imports at a first update, which is nobody's memory."""
    layer = torch.nn.Linear(8, 8)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    layer(torch.ones(8, 8)).sum().backward()
    torch.nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
    optimizer.step()


def prepare_model(job: Job) -> tuple[dict, Callable]:
    contestant = CONTESTANTS[job.contestant](job)
    contestant.imports()
    load_late_parts()
    if job.memory and job.device == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(job.memory * 1e9 / total)
    torch.manual_seed(0)
    meter = Meter(job.device)
    start = time.perf_counter()
    contestant.build()
    wake, work, loss = tasks(contestant)
    about = {"prepare": time.perf_counter() - start, "threads": torch.get_num_threads(),
             "classes": contestant.classes, "precision": str(contestant.precision).removeprefix("torch."),
             "forward_flops": forward_flops(job.model, job.size, contestant.classes)}

    def do_round() -> dict:
        if meter.cuda:  # takes its memory back and raises the clocks
            wake()
        loss.clear()
        meter.wait()
        start = time.perf_counter()
        seen = work()
        meter.wait()
        done = {"seconds": time.perf_counter() - start, "images": seen, "peak": meter.peak(),
                "micro_batches": contestant.micro_batches, "loss": loss[0].item() if loss else None}
        if loss and not math.isfinite(done["loss"]):
            raise FloatingPointError(f"the loss is {done['loss']}")
        meter.rest()
        return done
    return about, do_round


def prepare_views(job: Job) -> tuple[dict, Callable]:
    """One thread; the clock counts the processor's time of all threads."""
    torch.set_num_threads(1)
    make, made = VIEWS[job.contestant](job), 0

    def do_round() -> dict:
        nonlocal made
        start = time.process_time()
        for k in range(made, made + job.count):
            make(k)
        made += job.count
        return {"seconds": time.process_time() - start, "images": job.batch * job.count}
    return {"threads": 1, "precision": "float32"}, do_round


if __name__ == "__main__":
    asked = Job(**json.loads(sys.argv[1]))
    serve(lambda: prepare_views(asked) if asked.task == "augmentation" else prepare_model(asked))
