"""What a person sees while it trains: step results read a few steps late, the bar, the speed, and when to stop."""

import logging
import sys
import time
from collections import deque
from contextlib import contextmanager

import torch
from tqdm import tqdm

from utils.step import StepResult

log = logging.getLogger(__name__)

LATE = 4  # steps between an update and the reading of its numbers: the device never waits for the reader


class Progress:
    """Follows the updates of a run: `add` each, `flush` before an evaluation.

    FloatingPointError: an update was not finite (outside fp16's normal overflows), or the loss scale fell below 1;
    names the true step. The update itself was masked on the device.
    """

    def __init__(self, run, total: int, batch_size: int, scaled: bool):
        self.run, self.total, self.batch_size, self.scaled = run, total, batch_size, scaled
        self.pending = deque()
        self.skipped = 0
        self.loss = self.rate = float("nan")
        self.bar = tqdm(total=total, unit="step", dynamic_ncols=True, smoothing=0.1,
                        disable=None if sys.stderr.isatty() else True)
        self.started = time.perf_counter()
        self.done = 0      # the last step that was read
        self.mark = None   # (step, moment) from which the speed is measured; none right after a pause

    def add(self, step: int, lr: float, result: StepResult) -> None:
        """After update number `step` (the first is 1)."""
        numbers = torch.stack([value.detach().float() for value in result])
        moment = time.perf_counter()
        if numbers.is_cuda:
            numbers = numbers.to("cpu", non_blocking=True)
            moment = torch.cuda.Event(enable_timing=True)
            moment.record()
        self.pending.append((step, lr, numbers, moment))
        if len(self.pending) > LATE:
            self._read()

    def flush(self) -> None:
        """Reads what is still pending; the device has to finish for it."""
        while self.pending:
            self._read()

    @contextmanager
    def paused(self):
        """The time inside (an evaluation) does not count as training."""
        self.flush()
        yield
        self.mark = None

    def say(self, text: str) -> None:
        """A line that stays: where the run is, and `text`."""
        left = (time.perf_counter() - self.started) / max(self.done, 1) * (self.total - self.done)
        log.info("step %d/%d  loss %.4f  %s  %.0f images/s  %s left", self.done, self.total, self.loss, text,
                 self.rate, tqdm.format_interval(left))

    def _read(self) -> None:
        step, lr, numbers, moment = self.pending.popleft()
        if isinstance(moment, torch.cuda.Event):
            moment.synchronize()
        loss, accuracy, norm, finite, scale = numbers.tolist()
        values = {}
        if self.mark is None:
            self.mark = step, moment
        elif step % 10 == 0 or step == self.total:
            values["train_images_per_second"] = self.rate = self._speed(step, moment)
        self.done = step
        self.run.log(step, train_loss=loss, train_accuracy=accuracy, train_lr=lr, train_grad_norm=norm, **values)
        self.loss = loss
        self.bar.update(step - self.bar.n)
        self.bar.set_postfix_str(f"loss {loss:.4f}, lr {lr:.2e}, {self.rate:,.0f} images/s", refresh=False)
        if not finite:
            self._not_finite(step, lr, scale, loss)

    def _speed(self, step: int, moment) -> float:
        """Images a second since the last mark, by the device's own clock; sets the mark anew."""
        before, then = self.mark
        seconds = then.elapsed_time(moment) / 1000 if isinstance(moment, torch.cuda.Event) else moment - then
        self.mark = step, moment
        return (step - before) * self.batch_size / seconds

    def _not_finite(self, step, lr, scale, loss) -> None:
        if self.scaled and scale >= 1:
            self.skipped += 1
            return
        self.bar.close()
        why = (f"the loss scale fell to {scale:g}" if self.scaled else
               f"the {'loss' if loss != loss or abs(loss) == float('inf') else 'gradient'} was not finite")
        raise FloatingPointError(
            f"Update {step} was not made: {why} (learning rate {lr:.3g}). "
            f"Try a third of --learning_rate, more --warmup_steps{', or --precision bf16' if self.scaled else ''}.")

    def close(self) -> None:
        self.bar.close()
        if self.skipped:
            log.info("%d of %d updates overflowed in float16 and were skipped, as its loss scaling expects.",
                     self.skipped, self.total)
