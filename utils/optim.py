"""Learning rate, optimiser, clipping: Google's rules (`vit_jax/utils.py`, `train.py`) where they decide numbers."""

import math

import torch
from torch import Tensor, nn
from torch.optim.sgd import sgd

LINEAR_END = 1e-5  # where Google's linear decay ends; cosine ends at zero


def lr_at(step: int, *, base: float, total: int, warmup: int, decay: str = "cosine",
          linear_end: float = LINEAR_END) -> float:
    """Learning rate of the update that `step` updates came before (update k sees step k - 1, as optax counts).

    Linear warm-up from exactly zero, then cosine to zero, linear to `linear_end` (`create_learning_rate_schedule`), or
    constant.
    Rounded to float32, as the value that Google's update multiplies with.
    """
    progress = min(max((step - warmup) / max(total - warmup, 1), 0.0), 1.0)
    if decay == "linear":
        lr = linear_end + (base - linear_end) * (1 - progress)
    elif decay == "cosine":
        lr = base * 0.5 * (1 + math.cos(math.pi * progress))
    elif decay == "constant":
        lr = base
    else:
        raise ValueError(f"There is no decay '{decay}': choose cosine, linear or constant.")
    if warmup:
        lr *= min(1.0, step / warmup)
    return torch.tensor(lr, dtype=torch.float32).item()


def make_optimizer(model: nn.Module, name: str, *, weight_decay: float = 0.0,
                   momentum_dtype: torch.dtype | None = None) -> torch.optim.Optimizer:
    """SGD with momentum 0.9 (the paper's), Adam or AdamW over all parameters; the learning rate is set each step.

    momentum_dtype: of SGD's stored momentum; None: the weights' own. Google's runs keep it in bfloat16.
    AdamW decays kernels only, not biases, norms, the class token or position embeddings.
    All are PyTorch's fused kernels: they skip an update on the device when `found_inf` says so.
    ValueError: no such optimiser, or a momentum type for one that is not sgd.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    if name in ("adam", "adamw") and momentum_dtype is not None:
        raise ValueError(f"Only sgd's momentum can be kept in another type, not the moments of {name}.")
    if name == "sgd" and momentum_dtype not in (None, parameters[0].dtype):
        return NarrowMomentumSGD(parameters, momentum_dtype, weight_decay=weight_decay)
    if name == "sgd":
        optimizer = torch.optim.SGD(parameters, lr=0.0, momentum=0.9, weight_decay=weight_decay, fused=True)
        for p in parameters:  # else a skipped first update would leave PyTorch's momentum uninitialised
            optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
        return optimizer
    if name == "adam":
        return torch.optim.Adam(parameters, lr=0.0, weight_decay=weight_decay, fused=True)
    if name == "adamw":
        kernels = {id(p) for m in model.modules() if m is not model for p in m.parameters(recurse=False) if p.ndim > 1}
        groups = [{"params": [p for p in parameters if id(p) in kernels], "weight_decay": weight_decay},
                  {"params": [p for p in parameters if id(p) not in kernels], "weight_decay": 0.0}]
        return torch.optim.AdamW([g for g in groups if g["params"]], lr=0.0, fused=True)
    raise ValueError(f"There is no optimiser '{name}': choose sgd, adam or adamw.")


class NarrowMomentumSGD(torch.optim.Optimizer):
    """SGD that stores its momentum in a narrower type than the weights', as `optax.sgd(accumulator_dtype)` does.

    v = g + d * m; weights -= lr * v; m = v rounded to the narrow type. The step uses v before it is rounded, and d is
    itself rounded to that type: 0.8984375 for 0.9 in bfloat16. d * m is exact in float32, and XLA keeps it so; under
    float64 XLA rounds it to the narrow type, and so does this. The arithmetic, weight decay and the masking by
    `found_inf` (0-dimensional, on the weights' device) are those of PyTorch's fused kernel.
    """

    def __init__(self, parameters: list[Tensor], momentum_dtype: torch.dtype, *, momentum: float = 0.9,
                 weight_decay: float = 0.0):
        factor = torch.tensor(momentum, dtype=momentum_dtype).item()
        super().__init__(parameters, dict(lr=0.0, momentum=factor, weight_decay=weight_decay,
                                          momentum_dtype=momentum_dtype))
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p, dtype=momentum_dtype)

    @torch.no_grad()
    def step(self) -> None:
        """On a CPU one parameter at a time, so that its wide copy stays in the cache; elsewhere many in one kernel."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            many = 1 if group["params"][0].is_cpu else 32
            for first in range(0, len(parameters), many):
                self._update(parameters[first:first + many], group)

    def _update(self, parameters: list[Tensor], group: dict) -> None:
        narrow = [self.state[p]["momentum_buffer"] for p in parameters]
        wide = [torch.empty_like(p) for p in parameters]
        found_inf, factor = getattr(self, "found_inf", None), group["momentum"]
        rounds_product = parameters[0].dtype == torch.float64
        torch._foreach_copy_(wide, torch._foreach_mul(narrow, factor) if rounds_product else narrow)
        sgd(parameters, [p.grad for p in parameters], wide, fused=True, found_inf=found_inf, lr=group["lr"],
            momentum=1.0 if rounds_product else factor, weight_decay=group["weight_decay"], dampening=0.0,
            nesterov=False, maximize=False)
        if rounds_product and found_inf is not None:  # a masked update gives back d * m, and not m as in float32
            wide = [torch.where(found_inf.bool(), m, v) for m, v in zip(narrow, wide)]
        torch._foreach_copy_(narrow, wide)

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        for state in self.state.values():  # which PyTorch has cast to the type of the weights: exact, and undone here
            state["momentum_buffer"] = state["momentum_buffer"].to(self.defaults["momentum_dtype"])


def clip_by_global_norm(gradients: list[Tensor], max_norm: float) -> Tensor:
    """Scales all gradients in place so that their common L2 norm is at most `max_norm`; returns the norm before.

    Google's rule: g / norm * max where norm >= max, with no epsilon (PyTorch's adds 1e-6). 0 clips nothing.
    """
    norm = nn.utils.get_total_norm(gradients)
    if max_norm:
        torch._foreach_mul_(gradients, torch.where(norm < max_norm, torch.ones_like(norm), max_norm / norm))
    return norm
