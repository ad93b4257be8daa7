"""What of a model trains: all of it, its head, its last blocks, its norms, or small matrices beside its kernels."""

import re

from ml_collections import FrozenConfigDict
from torch import nn

from models import lora
from models.modeling import VisionTransformer


def parse(what: str, config: FrozenConfigDict) -> tuple[str, int]:
    """'last:3' -> ('last', 3), 'lora:8' -> ('lora', 8), 'head' -> ('head', 0); likewise norm and all.

    ValueError: none of these, or more blocks or a higher rank than a model of `config` has.
    """
    found = re.fullmatch(r"(all|head|norm)|(last|lora):([1-9][0-9]{0,5})", what)
    if not found:
        raise ValueError(f"--train is '{what}': choose head, last:N (the last N blocks), norm, lora:R (of rank R) or "
                         "all.")
    kind, number = found[1] or found[2], int(found[3] or 0)
    most = {"last": config.num_layers, "lora": config.hidden_size}.get(kind, 0)
    if number > most:
        has = f"{most} blocks" if kind == "last" else f"kernels of rank {most}"
        raise ValueError(f"--train is {what}, and {config.name} has {has}: give {kind}:{most} at most.")
    return kind, number


def choose(model: VisionTransformer, what: str, *, seed: int = 0) -> None:
    """Sets `requires_grad` of each parameter; the head (with a `pre_logits` before it) always trains.

    what: as `parse` takes it. last:N: also the final norm. norm: weights and biases of all LayerNorms and GroupNorms.
    lora:R: adds the matrices, drawn from `seed`. Once a model, before its optimiser is made and its state is loaded.
    A position embedding by formula never trains. Dropout acts in frozen parts, too. ValueError: as `parse`.
    """
    kind, number = parse(what, model.config)
    model.requires_grad_(kind == "all")
    model.pos_embed.requires_grad_(kind == "all" and model.config.pos_embed == "learned")
    trained = [model.pre_logits, model.head]
    if kind == "last":
        trained += [*model.blocks[-number:], model.norm]
    elif kind == "norm":
        trained += [module for module in model.modules() if isinstance(module, (nn.LayerNorm, nn.GroupNorm))]
    elif kind == "lora":
        lora.add(model, number, seed=seed)
    for module in trained:
        module.requires_grad_(True)


def in_words(model: VisionTransformer, what: str) -> str:
    """What of the model trains, and how many parameters of how many."""
    total = sum(p.numel() for p in model.parameters())
    training = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return f"{what}: {training:,} of {total:,} parameters ({100 * training / total:.3g} %)"
