"""Learning rate, optimiser, clipping: Google's rules (`vit_jax/utils.py`, `train.py`) where they decide numbers."""

import math

import torch
from torch import Tensor, nn

LINEAR_END = 1e-5  # where Google's linear decay ends; cosine ends at zero


def lr_at(step: int, *, base: float, total: int, warmup: int, decay: str = "cosine",
          linear_end: float = LINEAR_END) -> float:
    """Learning rate of the update that `step` updates came before (update k sees step k - 1, as optax counts).

    Linear warm-up from exactly zero, then cosine to zero or linear to `linear_end` (`create_learning_rate_schedule`).
    Rounded to float32, as the value that Google's update multiplies with.
    """
    progress = min(max((step - warmup) / max(total - warmup, 1), 0.0), 1.0)
    if decay == "linear":
        lr = linear_end + (base - linear_end) * (1 - progress)
    elif decay == "cosine":
        lr = base * 0.5 * (1 + math.cos(math.pi * progress))
    else:
        raise ValueError(f"There is no decay '{decay}': choose cosine or linear.")
    if warmup:
        lr *= min(1.0, step / warmup)
    return torch.tensor(lr, dtype=torch.float32).item()


def make_optimizer(model: nn.Module, name: str, *, weight_decay: float = 0.0) -> torch.optim.Optimizer:
    """SGD with momentum 0.9 (the paper's), Adam or AdamW over all parameters; the learning rate is set each step.

    AdamW decays kernels only, not biases, norms, the class token or position embeddings.
    All are PyTorch's fused kernels: they skip an update on the device when `found_inf` says so.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    if name == "sgd":
        optimizer = torch.optim.SGD(parameters, lr=0.0, momentum=0.9, weight_decay=weight_decay, fused=True)
        for p in parameters:  # else a skipped first update would leave PyTorch's momentum uninitialised
            optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
        return optimizer
    if name == "adam":
        return torch.optim.Adam(parameters, lr=0.0, weight_decay=weight_decay, fused=True)
    if name == "adamw":
        kernels = {id(m.weight) for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
        groups = [{"params": [p for p in parameters if id(p) in kernels], "weight_decay": weight_decay},
                  {"params": [p for p in parameters if id(p) not in kernels], "weight_decay": 0.0}]
        return torch.optim.AdamW([g for g in groups if g["params"]], lr=0.0, fused=True)
    raise ValueError(f"There is no optimiser '{name}': choose sgd, adam or adamw.")


def clip_by_global_norm(gradients: list[Tensor], max_norm: float) -> Tensor:
    """Scales all gradients in place so that their common L2 norm is at most `max_norm`; returns the norm before.

    Google's rule: g / norm * max where norm >= max, with no epsilon (PyTorch's adds 1e-6). 0 clips nothing.
    """
    norm = nn.utils.get_total_norm(gradients)
    if max_norm:
        torch._foreach_mul_(gradients, torch.where(norm < max_norm, torch.ones_like(norm), max_norm / norm))
    return norm
