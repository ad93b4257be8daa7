"""What a person sees of a run: step results read a few steps late, the bar, the speed."""

import logging
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from tqdm import tqdm

from utils.diagnosis import SETTLED, Diagnosis
from utils.step import StepResult

log = logging.getLogger(__name__)

PATIENCE = 25  # overflows in a row under a loss scale after which it is no longer the scale's search
SILENCE = 60  # seconds after which a log without a bar says where the run is
LATE = 4  # steps between an update and the reading of its numbers: the device never waits for the reader


class Progress:
    """Follows the updates of a run: `add` each, `flush` before an evaluation or a saving.

    FloatingPointError: an update was not finite (outside fp16's normal overflows), the loss scale fell below 1, or
    PATIENCE updates in a row overflowed;
    names the true step. The update itself was masked on the device.
    """

    def __init__(self, run, total: int, batch_size: int, scaled: bool, start: int = 0,
                 diagnosis: Diagnosis | None = None):
        self.run, self.total, self.batch_size, self.scaled = run, total, batch_size, scaled
        self.diagnosis = diagnosis
        self.pending = deque()
        self.skipped = self.skipped_in_a_row = 0
        self.loss = self.rate = float("nan")
        self.sums = [0, 0.0, 0.0]  # since the last evaluation: updates, their losses, their accuracies
        self.bar = tqdm(total=total, initial=start, unit="step", dynamic_ncols=True, smoothing=0.1,
                        disable=None if run.writes else True)
        self.started = self.spoke = time.perf_counter()
        self.start = self.done = start  # the last step that was read
        self.mark = None   # (step, moment) from which the speed is measured
        self.arrived = self.ended = None  # moments: the batch of the step under way came, the step before it ended
        self.timed, self.waited, self.taken = 0, 0.0, 0.0  # steps, and seconds of them: without a batch, and in all

    def state_dict(self) -> dict:
        """What a run that is continued still has to know: the counts, and what has been said."""
        return {"skipped": self.skipped, "skipped_in_a_row": self.skipped_in_a_row, "sums": self.sums,
                "diagnosis": self.diagnosis.state_dict() if self.diagnosis else {}}

    def load_state_dict(self, state: dict) -> None:
        self.skipped, self.skipped_in_a_row = state["skipped"], state["skipped_in_a_row"]
        self.sums = state.get("sums", self.sums)
        if self.diagnosis and state["diagnosis"]:
            self.diagnosis.load_state_dict(state["diagnosis"])

    def next(self, stream: Iterator) -> tuple[Tensor, Tensor]:
        """The next batch of the stream."""
        batch = next(stream)
        self.cuda = batch[0].is_cuda
        self.arrived = self._moment()
        return batch

    def add(self, step: int, lr: float, result: StepResult) -> None:
        """After update number `step` (the first is 1)."""
        numbers = torch.stack([value.detach().float() for value in result])
        self.cuda = numbers.is_cuda
        if self.cuda:
            numbers = torch.empty(len(numbers), pin_memory=True).copy_(numbers, non_blocking=True)
        moments = self.ended, self.arrived, self._moment()
        self.pending.append((step, lr, numbers, moments))
        self.ended = moments[-1]
        if len(self.pending) > LATE:
            self._read()

    def flush(self) -> None:
        """Reads what is still pending; the device has to finish for it."""
        while self.pending:
            self._read(last=len(self.pending) == 1)

    @contextmanager
    def paused(self):
        """The time inside (an evaluation, a saving) does not count as training."""
        self.flush()
        yield
        if self.done > self.start:
            self.mark = self.done, self._moment()
        self.ended = None

    def means(self) -> tuple[float, float]:
        """Mean loss and accuracy of the training batches since this was last asked; NaN where there were none."""
        updates, loss, accuracy = self.sums
        self.sums = [0, 0.0, 0.0]
        return (loss / updates, accuracy / updates) if updates else (float("nan"), float("nan"))

    def say(self, text: str) -> None:
        """A line that stays: where the run is, and `text`."""
        left = (time.perf_counter() - self.started) / max(self.done - self.start, 1) * (self.total - self.done)
        speed = f"{self.rate:,.0f} images/s  " if self.rate == self.rate else ""  # none after a first step alone
        self.spoke = time.perf_counter()
        log.info("step %d/%d  %s  %s%s left", self.done, self.total, text, speed, tqdm.format_interval(left))

    def _tell(self, sentences: list[str]) -> None:
        for sentence in sentences:
            log.warning("step %d: %s", self.done, sentence)

    def _moment(self):
        """Now, on the clock of the device that does the work."""
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _read(self, last: bool = False) -> None:
        step, lr, numbers, (before, arrived, moment) = self.pending.popleft()
        if self.cuda:
            moment.synchronize()
        loss, accuracy, norm, finite, scale, share = numbers.tolist()
        if self.mark is None:
            self.mark = step, moment
        elif step % 10 == 0 or last:
            self.rate = self._speed(step, moment)
        # The lines are the same wherever a run was interrupted; not so the speed, null where it is not known yet.
        speed = {"train_images_per_second": self.rate} if step % 10 == 0 else {}
        self.done = step
        self.run.log(step, train_loss=loss, train_accuracy=accuracy, train_lr=lr, train_grad_norm=norm, **speed)
        self.loss = loss
        self.sums = [total + value for total, value in zip(self.sums, (1, loss, accuracy))]
        self.bar.update(step - self.bar.n)
        if self.bar.disable and time.perf_counter() - self.spoke > SILENCE:  # a file, where a bar would not be seen
            self.say(f"loss {loss:.4f}  lr {lr:.2e}")
        self.bar.set_postfix_str(f"loss {loss:.4f}, lr {lr:.2e}, {self.rate:,.0f} images/s", refresh=False)
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        if not finite:
            self._not_finite(step, lr, scale, loss)
        if self.diagnosis:
            self._tell(self.diagnosis.update(step, loss, accuracy, bool(finite), scale, share or None))
        if before is not None and arrived is not None:  # of the device's own time: the host may run ahead
            self._time(step, self._seconds(before, arrived), self._seconds(before, moment))

    def _time(self, step: int, wait_seconds: float, step_seconds: float) -> None:
        self.timed += 1
        if self.timed == SETTLED + 1:  # those before filled the pipeline: they count in a run that has no others
            self.waited = self.taken = 0.0
        self.waited, self.taken = self.waited + wait_seconds, self.taken + step_seconds
        if self.diagnosis:
            self._tell(self.diagnosis.waited(step, wait_seconds, step_seconds))

    @property
    def data_wait_share(self) -> float:
        """The share of this process's steps' time for which the device had no batch to work on; NaN before a second
        step. Evaluations and savings are in neither time."""
        return self.waited / self.taken if self.taken else float("nan")

    def _speed(self, step: int, moment) -> float:
        """Images a second since the last mark, which moves here."""
        before, then = self.mark
        self.mark = step, moment
        return (step - before) * self.batch_size / max(self._seconds(then, moment), 1e-9)

    def _seconds(self, start, end) -> float:
        return start.elapsed_time(end) / 1000 if self.cuda else end - start

    def _not_finite(self, step, lr, scale, loss) -> None:
        if self.scaled and scale >= 1 and self.skipped_in_a_row < PATIENCE:
            self.skipped += 1
            return
        self.bar.close()
        why = (f"the loss scale fell to {scale:g}" if self.scaled and scale < 1 else
               f"it was the {PATIENCE}th in a row to overflow" if self.scaled else
               f"the {'loss' if loss != loss or abs(loss) == float('inf') else 'gradient'} was not finite")
        raise FloatingPointError(
            f"Update {step} was not made: {why} (learning rate {lr:.3g}). "
            f"Try a third of --learning_rate, more --warmup_steps{', or --precision bf16' if self.scaled else ''}.")

    def close(self) -> None:
        self.bar.close()
        if self.taken:
            log.info("data     the device waited for images for %.1f %% of its time", 100 * self.data_wait_share)
        if self.skipped:
            log.info("%d of %d updates overflowed in float16 and were skipped, as its loss scaling expects.",
                     self.skipped, self.total)
