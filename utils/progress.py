"""What a person sees: the summary before, then step results read a few steps late, the bar, the speed."""

import logging
import time
from collections import deque
from contextlib import contextmanager

import torch
from tqdm import tqdm

from models.fill import native_size
from utils.step import StepResult

log = logging.getLogger(__name__)

PATIENCE = 25  # overflows in a row under a loss scale after which it is no longer the scale's search
LATE = 4  # steps between an update and the reading of its numbers: the device never waits for the reader


def summarise(settings, dataset, model, origin, device, precision, folder) -> None:
    """What is about to happen, and what of it looks unwise."""
    s, images = settings, len(dataset.train)
    parts = f" = {s.gradient_accumulation_steps} x {s.train_batch_size // s.gradient_accumulation_steps}"
    held = f", {len(dataset.val):,} val" if dataset.val else ""
    for what, text in {
        "model": f"{model.config.name}, {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, "
                 f"{model.img_size[0]} x {model.img_size[1]} px, {model.config.in_chans} channels, "
                 f"dropout {model.config.dropout_rate:g}",
        "weights": f"{origin['name']} (sha256 {origin['sha256'][:12]}), new head" if origin else "random: from scratch",
        "data": f"{dataset.name}: {images:,} train{held}, {len(dataset.test):,} {dataset.test_name}, "
                f"{len(dataset.train.classes)} classes",
        "batch": f"{s.train_batch_size}{parts if s.gradient_accumulation_steps > 1 else ''}; "
                 f"{s.num_steps:,} steps are {s.num_steps * s.train_batch_size / images:.3g} epochs",
        "recipe": f"{s.optimizer}{', bfloat16 momentum' * (s.momentum_dtype == 'bfloat16')}, LR {s.learning_rate:g} "
                  f"after {s.warmup_steps} steps of warm-up, {s.decay_type}, clip {s.max_grad_norm:g}, "
                  f"weight decay {s.weight_decay:g}, seed {s.seed}",
        "device": f"{torch.cuda.get_device_name(device) if device.type == 'cuda' else 'cpu'}, "
                  f"{str(precision).removeprefix('torch.')}",
        "output": str(folder),
    }.items():
        log.info("%-8s %s", what, text)
    if s.fp16_opt_level != "O2":
        log.info("--fp16_opt_level was apex's and decides nothing any more: --fp16 is PyTorch's own autocast.")
    if dataset.val is None:
        log.warning("Nothing is held out: `best` will be picked on the test set, as ViT-pytorch does. For an honest "
                    "choice use --val_fraction 0.1.")
    if (used := native_size(model.config, model.grid)) != model.img_size:
        log.warning("Images of %d x %d px are no whole number of patches: what is right of or below %d x %d is not "
                    "looked at, as in Google's code.", *model.img_size, *used)
    if s.warmup_steps >= s.num_steps:
        log.warning("The warm-up of %d steps is not over when the run of %d ends, and the learning rate stays small: "
                    "try --warmup_steps %d.", s.warmup_steps, s.num_steps, s.num_steps // 20)
    if s.train_batch_size > images:
        log.warning("A batch of %d shows some of the %d training images more than once: try a smaller "
                    "--train_batch_size.", s.train_batch_size, images)


class Progress:
    """Follows the updates of a run: `add` each, `flush` before an evaluation.

    FloatingPointError: an update was not finite (outside fp16's normal overflows), the loss scale fell below 1, or
    PATIENCE updates in a row overflowed;
    names the true step. The update itself was masked on the device.
    """

    def __init__(self, run, total: int, batch_size: int, scaled: bool):
        self.run, self.total, self.batch_size, self.scaled = run, total, batch_size, scaled
        self.pending = deque()
        self.skipped = self.skipped_in_a_row = 0
        self.loss = self.rate = float("nan")
        self.bar = tqdm(total=total, unit="step", dynamic_ncols=True, smoothing=0.1, disable=None)
        self.started = time.perf_counter()
        self.done = 0      # the last step that was read
        self.mark = None   # (step, moment) from which the speed is measured

    def add(self, step: int, lr: float, result: StepResult) -> None:
        """After update number `step` (the first is 1)."""
        numbers = torch.stack([value.detach().float() for value in result])
        self.cuda = numbers.is_cuda
        if self.cuda:
            numbers = torch.empty(len(numbers), pin_memory=True).copy_(numbers, non_blocking=True)
        self.pending.append((step, lr, numbers, self._moment()))
        if len(self.pending) > LATE:
            self._read()

    def flush(self) -> None:
        """Reads what is still pending; the device has to finish for it."""
        while self.pending:
            self._read(last=len(self.pending) == 1)

    @contextmanager
    def paused(self):
        """The time inside (an evaluation) does not count as training."""
        self.flush()
        yield
        self.mark = self.done, self._moment()

    def say(self, text: str) -> None:
        """A line that stays: where the run is, and `text`."""
        left = (time.perf_counter() - self.started) / max(self.done, 1) * (self.total - self.done)
        speed = f"{self.rate:,.0f} images/s  " if self.rate == self.rate else ""  # none after a first step alone
        log.info("step %d/%d  loss %.4f  %s  %s%s left", self.done, self.total, self.loss, text, speed,
                 tqdm.format_interval(left))

    def _moment(self):
        """Now, on the clock of the device that does the work."""
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _read(self, last: bool = False) -> None:
        step, lr, numbers, moment = self.pending.popleft()
        if self.cuda:
            moment.synchronize()
        loss, accuracy, norm, finite, scale = numbers.tolist()
        values = {}
        if self.mark is None:
            self.mark = step, moment
        elif step % 10 == 0 or last:
            values["train_images_per_second"] = self.rate = self._speed(step, moment)
        self.done = step
        self.run.log(step, train_loss=loss, train_accuracy=accuracy, train_lr=lr, train_grad_norm=norm, **values)
        self.loss = loss
        self.bar.update(step - self.bar.n)
        self.bar.set_postfix_str(f"loss {loss:.4f}, lr {lr:.2e}, {self.rate:,.0f} images/s", refresh=False)
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        if not finite:
            self._not_finite(step, lr, scale, loss)

    def _speed(self, step: int, moment) -> float:
        """Images a second since the last mark, which moves here."""
        before, then = self.mark
        seconds = then.elapsed_time(moment) / 1000 if self.cuda else moment - then
        self.mark = step, moment
        return (step - before) * self.batch_size / max(seconds, 1e-9)

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
        if self.skipped:
            log.info("%d of %d updates overflowed in float16 and were skipped, as its loss scaling expects.",
                     self.skipped, self.total)
