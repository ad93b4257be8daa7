"""Named protocols: of which runs the published tables were made. Each is what one source did; they are never mixed.

paper: Dosovitskiy et al. 2021, section 4.1, B.1.1 and Table 4. vit_jax: the repository's README and `configs/vit.py`.
augreg: Steiner et al. 2022, Table 4. short: the README's short schedules. ViT-pytorch: jeonsworld's README and
script. mini: the paper's way with our own small checkpoint, to see the whole machinery in minutes; nobody has published
its numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import NamedTuple

from models.published import SAME_WEIGHTS
from utils.data import NAMED

ORIGINAL = ("ViT-B_16", "ViT-B_32", "ViT-L_16", "ViT-L_32", "ViT-H_14")
AUGREG = {"ViT-Ti_16": "Ti_16", "ViT-S_32": "S_32", "ViT-S_16": "S_16", "ViT-B_32": "B_32", "ViT-B_16": "B_16",
          "ViT-L_16": "L_16", "R+ViT-Ti_16": "R_Ti_16", "R26+ViT-S_32": "R26_S_32", "R50+ViT-L_32": "R50_L_32"}
SETS = ("cifar10", "cifar100", "pets", "flowers", "imagenet")
DROPOUT = {"ViT-L_16": 0.1, "ViT-H_14": 0.1, "R50+ViT-B_16": 0.1}  # vit_jax/configs/models.py; 0 elsewhere


class Option(NamedTuple):
    """What is chosen on the held-out part."""
    steps: int
    warmup: int
    rate: float


class Cell(NamedTuple):
    """One run of train.py: `choosing`, a candidate that is scored on the held-out part; else one that counts."""
    row: "Row"
    option: Option
    seed: int
    choosing: bool

    @property
    def name(self) -> str:
        steps, _, rate = self.option
        return f"{self.row.name}/{'choose' if self.choosing else 'final'}-{steps}-{rate:g}-seed{self.seed}"

    def flags(self) -> dict[str, str | int | float]:
        """Of train.py, without where things lie and how they are computed."""
        row, (steps, warmup, rate) = self.row, self.option
        held = row.held_out if self.choosing else row.kept_back
        return {"model_type": row.model, "pretrained_dir": row.checkpoint, "dataset": row.dataset, "img_size": row.size,
                "train_batch_size": row.batch, "num_steps": steps, "warmup_steps": warmup, "learning_rate": rate,
                "optimizer": "sgd", "seed": self.seed, "eval_every": row.eval_every or steps,
                **({"val_fraction": held} if held else {}), **dict(row.flags)}


@dataclass(frozen=True)
class Row:
    """What one number of a table takes: options, of which the held-out part chooses one, and its runs, a seed each."""

    protocol: str
    model: str
    checkpoint: str
    dataset: str
    size: int
    options: tuple[Option, ...]
    held_out: float = 0.0        # share of train on which an option is chosen
    kept_back: float = 0.0       # share of train that the runs that count leave out, too
    batch: int = 512
    eval_every: int = 0          # 0: at the end alone
    flags: tuple[tuple[str, str | int | float | bool], ...] = ()
    best_on_test: bool = False   # the number is the best of the evaluations on the test set, as ViT-pytorch reports it
    images: tuple[int, int] | None = None  # of train and test; None: a named set's

    @property
    def name(self) -> str:
        """Of its folder: what tells it from every other row of the table."""
        steps = "" if len({option.steps for option in self.options}) > 1 else f"-{self.options[0].steps}"
        dropout = f"-dropout{dict(self.flags)['dropout']:g}" if self.protocol == "vit_jax" else ""
        start = f"{self.model}-{self.family}" if self.family != self.model else self.model
        return f"{PurePath(self.dataset).name}-{start}-{self.size}{steps}{dropout}"

    @property
    def family(self) -> str:
        """The folder of Google's bucket that the checkpoint is from."""
        return self.checkpoint.removeprefix("checkpoint/").split("/")[0].removesuffix(".npz")

    def choosing(self) -> list[Cell]:
        """The candidates; none, where there is nothing to choose."""
        return [Cell(self, option, 0, True) for option in self.options] if len(self.options) > 1 else []

    def finals(self, option: Option, seeds: int) -> list[Cell]:
        return [Cell(self, option, seed, False) for seed in range(seeds)]


class Protocol(NamedTuple):
    models: tuple[str, ...]
    datasets: tuple[str, ...]
    seeds: int  # that its source ran
    about: str


PROTOCOLS = {
    "paper": Protocol(ORIGINAL, SETS, 3, "SGD, batch 512, cosine, clip 1, no weight decay, 384 px; the learning rate "
                      "is chosen on a held-out part of train, then all of train is used; the test part chooses "
                      "nothing. Dropout, which the paper does not tell, is the published configuration's"),
    "vit_jax": Protocol(("R50+ViT-B_16", "ViT-B_16", "ViT-B_32", "ViT-L_16", "ViT-L_32"), ("cifar10", "cifar100",
                        "imagenet"), 1, "the repository's: 98 % of train (ImageNet 99 %), fixed learning rates, "
                        "without dropout and with 0.1, momentum in bfloat16"),
    "augreg": Protocol(tuple(AUGREG), ("cifar100", "pets", "imagenet"), 1, "AugReg files; ImageNet at 224 and 384 px "
                       "(Tables 3 and 4), the others, whose resolution is not stated, at 224 (Table 5); steps and "
                       "learning rate are chosen on a held-out part of train"),
    "short": Protocol(("ViT-B_16",), ("cifar10", "cifar100"), 1, "500 and 1,000 steps; what the README leaves open "
                      "is vit_jax's: 384 px, learning rates, 98 % of train, momentum in bfloat16"),
    "ViT-pytorch": Protocol(("ViT-B_16", "R50+ViT-B_16", "ViT-L_32"), ("cifar10", "cifar100"), 1, "all of train, no "
                            "flips, dropout 0.1, learning rate 0.03; its numbers are the best of the evaluations on "
                            "the test set, every 100 steps"),
    "mini": Protocol(("ViT-demo",), ("cifar10", "digits"), 2, "the paper's way in miniature, with our ViT-demo.npz"),
}


def rows(table: str, models: Sequence[str] = (), datasets: Sequence[str] = ()) -> list[Row]:
    """The rows of a table; models, datasets: only these (of mini any folder of images may be one).

    ValueError: the protocol has no such model or data set.
    """
    protocol = PROTOCOLS[table]
    for asked, known, what in ((models, protocol.models, "model"), (datasets, protocol.datasets, "data set")):
        if unknown := [name for name in asked if name not in known and not (table == "mini" and what == "data set")]:
            raise ValueError(f"The protocol {table} has no {what} '{unknown[0]}': it has {', '.join(known)}.")
    make = {"paper": _paper, "vit_jax": _vit_jax, "augreg": _augreg, "short": _short, "ViT-pytorch": _vit_pytorch,
            "mini": _mini}[table]
    return [row for model in models or protocol.models for dataset in datasets or protocol.datasets
            for row in make(model, dataset)]


def _file(model: str, family: str = "imagenet21k") -> str:
    return f"checkpoint/{family}/{model}.npz"


def _paper(model: str, dataset: str) -> list[Row]:
    s = NAMED[dataset]
    return [Row("paper", model, _file(model), dataset, 384, tuple(Option(s.steps, s.warmup, rate) for rate in s.rates),
                held_out=s.held_out)]


def _vit_jax(model: str, dataset: str) -> list[Row]:
    """Both columns of the README's table: without dropout, and with 0.1."""
    s = NAMED[dataset]
    rate = 0.01 if (model, dataset) == ("ViT-B_16", "cifar10") else 0.03  # vit_jax/configs/vit.py
    return [Row("vit_jax", model, _file(model), dataset, 384, (Option(s.steps, s.warmup, rate),), kept_back=s.held_out,
                flags=(("momentum_dtype", "bfloat16"), ("dropout", dropout))) for dropout in (0.0, 0.1)]


def _augreg(model: str, dataset: str) -> list[Row]:
    """Steiner et al. 2022: Table 4's sweep for ImageNet (Table 3), Table 5's own for the others, on the file of 300
    epochs of ImageNet-21k that has a public copy."""
    if dataset == "imagenet":
        options = tuple(Option(20_000, 500, rate) for rate in (0.01, 0.03))
    else:
        options = tuple(Option(steps, warmup, rate) for steps, warmup in ((500, 100), (2_500, 200))
                        for rate in (0.001, 0.003, 0.01, 0.03))
    name = next(name for name in SAME_WEIGHTS
                if name.startswith(f"augreg/{AUGREG[model]}-i21k-300ep") and "--" not in name)
    sizes = (224, 384) if dataset == "imagenet" else (224,)
    return [Row("augreg", model, f"checkpoint/{name}.npz", dataset, size, options, held_out=NAMED[dataset].held_out,
                flags=(("momentum_dtype", "bfloat16"), ("dropout", 0.0))) for size in sizes]


def _short(model: str, dataset: str) -> list[Row]:
    rate = 0.01 if dataset == "cifar10" else 0.03
    return [Row("short", model, _file(model), dataset, 384, (Option(steps, steps // 10, rate),), kept_back=0.02,
                flags=(("momentum_dtype", "bfloat16"),)) for steps in (500, 1_000)]


def _vit_pytorch(model: str, dataset: str) -> list[Row]:
    """Its tables: 10,000 steps at both sizes, 500 and 1,000 for B/16, and from files fine-tuned on ImageNet."""
    flags = (("dropout", 0.1), ("no_flip", True))
    both = "imagenet21k+imagenet2012"
    starts = [(_file(model), size, 10_000, 500) for size in ((224,) if model == "ViT-L_32" else (224, 384))]
    if model == "ViT-B_16":
        starts += [(_file(model), 224, steps, 100) for steps in (500, 1_000)]
        starts += [(_file("ViT-B_16-224", both), 224, 10_000, 500)]
    if model == "ViT-L_32":
        starts += [(_file(model, both), 224, 10_000, 500)]
    return [Row("ViT-pytorch", model, file, dataset, size, (Option(steps, warmup, 0.03),), eval_every=100, flags=flags,
                best_on_test=True) for file, size, steps, warmup in starts]


def _mini(model: str, dataset: str) -> list[Row]:
    return [Row("mini", model, f"checkpoint/{model}.npz", dataset, 32, tuple(Option(40, 4, rate) for rate in
                (0.01, 0.03, 0.1)), held_out=0.1, batch=64)]
