"""Weights averaged over the updates of a run: exponentially (EMA), or their plain mean from some update on (SWA).

The arithmetic is PyTorch's (`torch.optim.swa_utils`), on lists of tensors. Its `AveragedModel` around that would wait
for the GPU at every update, copy and average frozen weights, too, know one decay only, and average LoRA's factors.
"""

from copy import deepcopy
from typing import Any

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn, get_swa_multi_avg_fn

from models import lora
from models.modeling import VisionTransformer


def decay_at(averages: int, ema: float) -> float:
    """What is kept of an average of so many weights when the next ones come: (1 + t) / (10 + t), but `ema` at most, as
    TensorFlow's `ExponentialMovingAverage(num_updates)` has it.

    A fixed decay of 0.9999 remembers 10,000 updates: after a run of 500 it would still be 95 % the start, of which the
    head is no good. By this rule it remembers (10 + t) / 9 updates, always the end of what there was.
    """
    return min(ema, (1 + averages) / (10 + averages))


class Average:
    """The mean of a model's weights over its updates; `model` has it, a plain VisionTransformer without LoRA that can
    be evaluated and exported as it is. Until it is `ready`, that has the weights with which it was made.

    model: what trains, on its device, with LoRA if any. The two share the weights that are frozen: these cost nothing.
    Processes that train the same weights have the same average. ema: the decay, between 0 and 1; 0: none. swa_from:
    after so many updates the weights after each count alike (Izmailov et al. 2018 take them once an epoch, under a
    learning rate that is kept up or cycles). The type stays that of the weights, float32, whatever autocast does.
    ValueError: not exactly one of the two, or out of its range.
    """

    def __init__(self, model: VisionTransformer, *, ema: float = 0.0, swa_from: int | None = None):
        if bool(ema) == (swa_from is not None) or not 0 <= ema < 1 or (swa_from or 0) < 0:
            raise ValueError("Weights are averaged either with a decay between 0 and 1 or from a number of updates on, "
                             f"not with ema={ema} and swa_from={swa_from}.")
        self.ema, self.swa_from, self.count = ema, swa_from, 0
        kernels = {id(layer.kernel.weight) for layer in model.modules() if isinstance(layer, lora.LowRank)}
        shared = {id(p): p for p in model.parameters() if not p.requires_grad and id(p) not in kernels}
        self.model = deepcopy(model, dict(shared)).eval()  # which leaves compiled programs behind
        lora.merge(self.model)
        self.model.requires_grad_(False)
        self.model.gradient_checkpointing = False
        self.averaged = {name: p for name, p in self.model.named_parameters() if id(p) not in shared}

    @property
    def ready(self) -> bool:
        return self.count > 0

    @torch.no_grad()
    def update(self, model: VisionTransformer, step: int) -> None:
        """Takes in the weights after update number `step`, which is 1 after the first; nothing waits for the device.

        Of LoRA the kernels W + B A are averaged, as the mean of products is no product of means. An update that was
        masked, its gradient not being finite, has left the weights as they were: these are averaged once more.
        """
        if step <= (self.swa_from or 0):
            self.count = 0  # a run that had come to its end was given more updates: the mean is of the new end
            return
        weights = lora.merged(model)  # without LoRA the weights themselves, no copies
        average, weights = list(self.averaged.values()), [weights[name] for name in self.averaged]
        if not self.ready:
            torch._foreach_copy_(average, weights)
        elif self.ema:
            get_ema_multi_avg_fn(decay_at(self.count, self.ema))(average, weights, None)
        else:
            get_swa_multi_avg_fn()(average, weights, self.count)
        self.count += 1

    def state_dict(self) -> dict[str, Any]:
        """Numbers, and the averaged weights by name once there are any: not those that are frozen."""
        weights = {name: p.detach() for name, p in self.averaged.items()} if self.ready else {}
        return {"ema": self.ema, "count": self.count, "weights": weights}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """`swa_from` may be another one. ValueError: averaged by another rule, or of another model; this one is then
        as before."""
        try:
            ema, count, weights = state["ema"], state["count"], state["weights"]
            found = {name: (value.shape, value.dtype) for name, value in weights.items()}
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"This is no state of averaged weights ({type(error).__name__}: {error}).") from error
        if ema != self.ema:
            raise ValueError(f"These weights were averaged with a decay of {ema}, not {self.ema} (0: as a plain mean).")
        expected = {name: (p.shape, p.dtype) for name, p in self.averaged.items()} if count else {}
        if found != expected:
            other = sorted(name for name in found.keys() | expected if found.get(name) != expected.get(name))
            raise ValueError(f"These averaged weights are another model's: {other[0]} does not fit.")
        for name, value in weights.items():
            self.averaged[name].copy_(value)
        self.count = count


def make_average(model: VisionTransformer, settings) -> Average | None:
    """The average that a run's settings ask for."""
    if not (settings.ema or settings.swa):
        return None
    last = max(round(settings.swa * settings.num_steps), 1)  # updates that the mean is over
    return Average(model, ema=settings.ema, swa_from=None if settings.ema else settings.num_steps - last)
