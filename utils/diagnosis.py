"""What goes wrong in silence, said once in a plain sentence: the loss does not move, all predictions are one class, the
loss scale keeps falling, the device waits for its images.

The thresholds come from some 70 runs on digits and on 32-px photographs with 2, 10, 200 and 1000 classes, batches of 4
to 512, at sane rates, at rates a hundred times too low or too high, and with shuffled labels; `tests/test_diagnosis.py`
holds some of their numbers. A word too soon is worse than none, so slow beginnings are left alone.
"""

import math
import os
from collections import deque

from utils.data import Split

WINDOW = (50, 200)   # updates after the warm-up that are looked at together: half of the run, within these limits
PER_CLASS = 25       # images of each class at least: 1000 classes in batches of 8 hardly move for 2000 updates
BLOCKS = 10          # that make up a window, which moves by one of them
STILL = 0.01         # share of the first loss that is no move: rates 100 times too low gave 0.6 %, a slow one 1.7 %
WORSE = 1.25         # times the first loss: rates too high gave 1.7 and more, shuffled labels about 1
ONE_CLASS = 0.97     # mean share of a batch: collapsed runs gave 0.98 to 1, others 0.87 at most
LARGEST = 0.8        # share of the training images: of a larger class alone, sane runs predict nothing else for long
SEARCH = 100         # first updates of float16, in which its loss scale is found: from 2^16 down
RECENT, FALLS = 1000, 6  # updates, and overflows among them: a scale that fits has one in 2000 updates, when it grows
SETTLED, WAITS = 20, 50  # steps until the pipeline is full; steps over which the waiting is measured
HELD_UP = 0.3        # share of the time: one process that decodes too slowly gave 0.36, two 0.24, images in memory 0.04


class Diagnosis:
    """Follows a run; `update` and `waited` return what is to be said now, each kind once a run.

    workers: processes that decode images (0: they lie in memory). largest_class_share: of the training images. mixed:
    images are mixtures of two, whose labels no model can tell at first: only a loss that grows is spoken of then.
    """

    def __init__(self, num_classes: int, warmup_steps: int, num_steps: int, batch_size: int, multi_label: bool = False,
                 workers: int = 0, largest_class_share: float = 0.0, mixed: bool = False):
        self.mixed = mixed
        self.warmup_steps, self.batch_size, self.multi_label = warmup_steps, batch_size, multi_label
        self.workers, self.largest_class_share = workers, largest_class_share
        window = min(max(WINDOW[0], (num_steps - warmup_steps) // 2), WINDOW[1])
        self.block_steps = math.ceil(max(window, PER_CLASS * num_classes / batch_size) / BLOCKS)
        self.said: list[str] = []               # kinds
        self.start: float | None = None         # the first loss: that of guessing, as a new head is zero
        self.blocks: list[list[float]] = [[0.0] * 4]  # updates, sums of loss, loss^2, share; the last one is not full
        self.overflows: list[list[float]] = []  # (step, loss scale), the recent ones
        self.times: deque[tuple[float, float]] = deque(maxlen=WAITS)  # waited, in all: seconds
        self.steps_here = 0                     # in this process

    def update(self, step: int, loss: float, accuracy: float, finite: bool, scale: float,
               share: float | None) -> list[str]:
        """After update number `step`: what it saw (`StepResult`). share: None (or 0) with several labels an image."""
        if not finite:
            return self._overflowed(step, scale)
        if self.start is None:
            self.start = loss
        if step <= self.warmup_steps:
            return []
        self.blocks[-1] = [a + b for a, b in zip(self.blocks[-1], (1, loss, loss * loss, share or 0.0))]
        if self.blocks[-1][0] < self.block_steps:
            return []
        window, self.blocks = self.blocks[-BLOCKS:], [*self.blocks[-BLOCKS:], [0.0] * 4]
        if len(window) < BLOCKS:
            return []
        n, losses, squares, shares = map(sum, zip(*window))
        late = [sum(column) for column in zip(*window[BLOCKS // 2:])]
        return self._still(int(n), losses, squares, late[1] / late[0]) + self._collapsed(int(n), shares / n)

    def _still(self, n: int, total: float, squares: float, late: float) -> list[str]:
        """Is the mean loss of n updates no better than the first one, by two standard errors? A rate that is too low
        leaves it slightly below, labels that mean nothing and rates that are too high leave it above. late: the
        mean over the second half; a model that has just begun to learn is left alone."""
        mean = total / n
        spread = math.sqrt(max(squares / n - mean * mean, 0.0))
        if mean - 2 * spread / math.sqrt(n) <= (1 - STILL) * self.start:
            return []
        if self.mixed and mean <= WORSE * self.start:
            return []
        if late < self.start and 2 * (mean - late) > STILL * self.start:
            return []
        then, now = f"{self.start:.4g}", f"{mean:.4g} over the last {n} updates"
        if mean < 1.001 * self.start:  # rounding and little noise may lift it
            return self._once("loss", f"The loss has not moved: {then} at first, {now}. Try ten times the "
                              "--learning_rate.")
        labels = "Try" if mean > WORSE * self.start else "Do the labels belong to the images? If so, try"
        return self._once("loss", f"The loss is no better than at first: {then} then, {now}. {labels} a tenth of the "
                          "--learning_rate.")

    def _collapsed(self, n: int, share: float) -> list[str]:
        """Smaller batches than 4 are often of one class by chance."""
        if self.multi_label or self.batch_size < 4 or share < ONE_CLASS or self.largest_class_share > LARGEST:
            return []
        return self._once("one class", f"Predictions have collapsed: in the last {n} updates {share:.0%} of a batch "
                          "were given the same class. Try a smaller --learning_rate or more --warmup_steps; where one "
                          "class has most of the images, --class_weights balanced.")

    def _overflowed(self, step: int, scale: float) -> list[str]:
        """An update that float16 could not hold was left out, and the loss scale halved."""
        if step <= SEARCH:
            return []
        self.overflows = [e for e in self.overflows if e[0] > step - RECENT] + [[step, scale]]
        if len(self.overflows) < FALLS:
            return []
        first, before = self.overflows[0]
        fell = f"the loss scale fell from {before:g} to {scale:g}" if scale < before / 2 else f"at loss scale {scale:g}"
        return self._once("scale", f"{len(self.overflows)} of the last {step - int(first) + 1} updates overflowed in "
                          f"float16 and were skipped; {fell}. Try --precision bf16, or a third of --learning_rate.")

    def waited(self, step: int, wait_seconds: float, step_seconds: float) -> list[str]:
        """Step `step` took so many seconds in all; for the first of them the device had no batch to work on."""
        self.steps_here += 1
        if self.steps_here <= SETTLED or "data" in self.said:
            return []
        self.times.append((wait_seconds, step_seconds))
        waits, steps = map(sum, zip(*self.times))
        waits -= max(self.times)[0]  # a disk may stop for once
        if len(self.times) < WAITS or waits <= HELD_UP * steps:
            return []
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        advice = (f"Try --num_workers {cores}, or images stored at about --img_size." if 0 < self.workers < cores else
                  "Store the images at about --img_size" + (", on a faster disk." if self.workers else "."))
        return self._once("data", f"For {waits / steps:.0%} of the last {WAITS} steps' time the device waited for "
                          f"images. {advice}")

    def _once(self, kind: str, sentence: str) -> list[str]:
        if kind in self.said:
            return []
        self.said.append(kind)
        return [sentence]

    def state_dict(self) -> dict:
        """Numbers, strings and lists of them. How long batches took says nothing about the next process: not in it."""
        return {"said": list(self.said), "start": self.start, "blocks": [list(block) for block in self.blocks],
                "overflows": [list(event) for event in self.overflows]}

    def load_state_dict(self, state: dict) -> None:
        self.said, self.start = list(state["said"]), state["start"]
        self.blocks, self.overflows = ([list(part) for part in state[name]] for name in ("blocks", "overflows"))


def diagnose(settings, train: Split, workers: int) -> Diagnosis:
    """Of a run on these images, which so many processes decode."""
    largest = 0 if train.multi_label else train.labels.bincount().max() / len(train)
    return Diagnosis(len(train.classes), settings.warmup_steps, settings.num_steps, settings.train_batch_size,
                     multi_label=train.multi_label, workers=workers, largest_class_share=float(largest),
                     mixed=bool(settings.mixup or settings.cutmix))
