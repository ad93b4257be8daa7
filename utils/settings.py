"""Every flag once: name, type, default, group and help. Presets, and the checks that need no data.

Where ViT-pytorch has a flag, ours has its name, meaning and default; but the micro-batches are found here, not given.
"""

import argparse
import difflib
import sys
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

RECIPES = {
    "vit-pytorch": {},  # the defaults below
    "paper": {"img_size": (384, 384)},  # Dosovitskiy et al. 2021, B.1.1, and vit_jax/configs/vit.py
    # What the public recipes for small sets have in common (Touvron et al. 2021; Lee et al. 2021): AdamW, strong
    # augmentation, stochastic depth. The learning rate is `scratch_lr`'s.
    "scratch": {"pretrained_dir": "none", "num_epochs": 50.0, "train_batch_size": 128, "optimizer": "adamw",
                "weight_decay": 0.05, "pad_crop": 4, "randaugment": 2, "mixup": 0.8, "cutmix": 1.0,
                "label_smoothing": 0.1, "drop_path": 0.1},
    # The small-ViT tutorial on CIFAR-10 whose results its readers compare with: a constant rate, no clipping.
    "tutorial": {"pretrained_dir": "none", "model_type": "ViT-CIFAR", "patch_proj": "linear", "num_epochs": 50.0,
                 "train_batch_size": 256, "optimizer": "adam", "learning_rate": 1e-3, "weight_decay": 5e-5,
                 "warmup_steps": 0, "decay_type": "constant", "max_grad_norm": 0.0, "pad_crop": 4},
    # How most tutorials fine-tune; for the paper's way take the defaults.
    "finetune-adam": {"num_epochs": 10.0, "train_batch_size": 128, "optimizer": "adam", "learning_rate": 1e-3,
                      "warmup_steps": 0, "img_size": (224, 224)},
}
LEARNERS = {"base": "ViT-B_16", "large": "ViT-L_16", "huge": "ViT-H_14"}  # --model: from scratch, as the paper's sizes
WARMUP = 1 / 20  # of the epochs, where nobody says otherwise: Google's 500 of 10,000 steps
GUESSED = {  # what other tools call it -> ours
    "--lr": ("--learning_rate",), "--epochs": ("--num_epochs",), "--steps": ("--num_steps",), "--bs":
    ("--train_batch_size",), "--arch": ("--model_type",), "--depth": ("--num_layers",), "--checkpoint":
    ("--pretrained_dir",), "--weights": ("--pretrained_dir",), "--data": ("--dataset",), "--image_size":
    ("--img_size",), "--resolution": ("--img_size",), "--output": ("--output_dir", "--name"), "--workers":
    ("--num_workers",), "--amp": ("--precision",), "--warmup": ("--warmup_steps",), "--accumulate":
    ("--gradient_accumulation_steps",)}
SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}  # a type's word in --precision
METRICS = ("auto", "accuracy", "loss", "macro_f1", "map")
PAPER_LR = {("ViT-B_16", "cifar10"): 0.01}  # vit_jax/configs/vit.py; 0.03 elsewhere


def image_size(text: str) -> tuple[int, int]:
    """'224' -> (224, 224), '224,320' -> (224, 320): height, width."""
    try:
        numbers = [int(n) for n in text.split(",")]
        if len(numbers) > 2 or min(numbers) < 1:
            raise ValueError
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is no image size: give 224 or height,width as in 224,320") from None
    return numbers[0], numbers[-1]


def micro_batches(text: str) -> int | str:
    """'4' -> 4, 'auto' -> 'auto'."""
    try:
        return text if text == "auto" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is no number of micro-batches: give 1 or more, or auto") from None


def flag(default, group: str, help: str, *, low: float | None = None, below: float | None = None,
         high: float | None = None, also: tuple[str, ...] = (), **options):
    """A setting whose command-line flag is made from these words. It is not under `low` nor above `high`, and under
    `below`; also: other spellings of the flag."""
    return field(default=default, metadata={"group": group, "help": help, "options": options, "also": also,
                                            "range": (low, below, high)})


# What may be given anew when a run is continued. Data may have moved; that it is the same is checked by its contents.
FREE = {"dataset", "labels", "data_dir", "check_data", "skip_unreadable", "num_workers", "gradient_accumulation_steps",
        "device", "local_rank", "fp16_opt_level", "name", "output_dir", "overwrite", "resume", "save_every", "dry_run",
        "eval_every", "eval_batch_size", "early_stopping", "no_report", "summary", "debug"}
GROWS = {"num_steps", "num_epochs"}  # what may grow then
SIZES = ("patch_size", "hidden_size", "num_layers", "num_heads", "mlp_dim", "pos_embed")  # that a checkpoint decides


@dataclass(frozen=True)
class Settings:
    """What decides a run. Whoever reads a field finds its meaning and default here."""

    dataset: str = flag(
        "cifar10", "data", "cifar10|cifar100|pets|flowers|imagenet|digits, or a folder: train/CLASS/*, test/ or val/")
    labels: str | None = flag(None, "data", "CSV of image,label[,split] or a column a class, for images in --dataset "
                              "(default: folders are classes)", type=str, metavar="FILE.csv")
    data_dir: str = flag("data", "data", "where named sets are kept or downloaded to")
    img_size: tuple[int, int] | None = flag(
        None, "data", "pixels, N or H,W (default: the checkpoint's; larger squares 224)", type=image_size, metavar="N")
    val_fraction: float = flag(0.0, "data", "share of train held out, on which `best` is then chosen", low=0, below=1)
    min_area: float | None = flag(None, "data", "smallest share of an image that a crop shows (default: the set's)",
                                  type=float, low=0, high=1)
    no_flip: bool = flag(False, "data", "never mirror training images")
    pad_crop: int = flag(0, "data", "crop out of the whole image with so many black pixels around, instead of "
                         "--min_area's box; 0: no", low=0)
    randaugment: int = flag(0, "data", "operations of RandAugment on each training image; 0: none", low=0)
    magnitude: int = flag(9, "data", "of RandAugment, 0 to 30", low=0, high=30)
    mixup: float = flag(0.0, "data", "alpha of mixup; 0: never. With --cutmix, each for half of the batches", low=0)
    cutmix: float = flag(0.0, "data", "alpha of CutMix; 0: never", low=0)
    check_data: bool = flag(False, "data", "look at every image before the run: readable, not in two parts at once")
    skip_unreadable: bool = flag(False, "data", "leave unreadable images out instead of stopping; looks at every image")
    num_workers: int = flag(-1, "data", "processes that decode sets too large for memory; -1: one a core, at most 8",
                            low=-1)

    model_type: str = flag("auto", "model", "a published name; auto: what the checkpoint is, ViT-B_16 without one")
    model: str | None = flag(None, "model", "a size to train from scratch: base (86 M parameters), large (304 M) or "
                             "huge (632 M) (default: --model_type)", choices=list(LEARNERS))
    pretrained_dir: str | None = flag(
        None, "model", "weights of any format; none: from scratch (default: checkpoint/MODEL_TYPE.npz)", type=str)
    in_chans: int | None = flag(None, "model", "channels of the images, 1 to N (default: the checkpoint's, 3)",
                                type=int, low=1)
    dropout: float | None = flag(None, "model", "dropout rate (default: the published configuration's)", type=float,
                                 low=0, below=1)
    drop_path: float | None = flag(
        None, "model", "stochastic depth: rate of the last block, 0 in the first (default: 0)", type=float, low=0,
        below=1)
    patch_proj: str | None = flag(
        None, "model", "patches by a convolution or a product, the same function (default: the checkpoint's, conv)",
        choices=["conv", "linear"])
    pos_embed: str | None = flag(
        None, "model", "from scratch: learned, sincos1d, sincos2d (fixed), or none (default: learned)",
        choices=["learned", "sincos1d", "sincos2d", "none"], metavar="KIND")
    patch_size: int | None = flag(
        None, "model", "from scratch: pixels of a patch's side (default: --model_type's)", type=int, low=1)
    hidden_size: int | None = flag(
        None, "model", "from scratch: width (default: --model_type's)", type=int, low=1)
    num_layers: int | None = flag(
        None, "model", "from scratch: blocks (default: --model_type's)", type=int, low=1)
    num_heads: int | None = flag(
        None, "model", "from scratch: heads, which share the width (default: --model_type's)", type=int, low=1)
    mlp_dim: int | None = flag(None, "model", "from scratch: width in the MLP (default: --model_type's, or 4 "
                               "times --hidden_size)", type=int, low=1)

    train: str = flag("all", "training", "what trains: head, last:N (blocks), norm, lora:R (of rank R) or all",
                      metavar="WHAT")
    few_shot: int = flag(0, "training", "score a ridge regression on frozen features of K images a class, and stop",
                         metavar="K", low=0)

    recipe: str = flag("vit-pytorch", "training", "other defaults, which --dry_run shows: paper, scratch, tutorial, "
                       "finetune-adam", choices=list(RECIPES), metavar="NAME")
    num_steps: int = flag(10_000, "training", "updates", low=1)
    num_epochs: float = flag(0.0, "training", "passes over the images, instead of --num_steps; each is evaluated",
                             low=0, high=1_000_000)
    train_batch_size: int = flag(512, "training", "images an update", low=1, also=("--batch_size",))
    gradient_accumulation_steps: int | str = flag(
        "auto", "training", "micro-batches that an update's images are split into; auto: as few as fit into memory",
        type=micro_batches, metavar="N|auto")
    learning_rate: float = flag(3e-2, "training", "peak learning rate", low=0)
    warmup_steps: int = flag(500, "training", "updates of linear warm-up (with --num_epochs: a twentieth)", low=0)
    warmup_epochs: float = flag(0.0, "training", "of linear warm-up, instead of --warmup_steps", low=0)
    decay_type: str = flag("cosine", "training", "after the warm-up", choices=["cosine", "linear", "constant"])
    optimizer: str = flag("sgd", "training", "sgd has momentum 0.9", choices=["sgd", "adam", "adamw"])
    momentum_dtype: str = flag("float32", "training", "of sgd's stored momentum; Google's runs kept it in bfloat16",
                               choices=["float32", "bfloat16"])
    weight_decay: float = flag(0.0, "training", "none in the paper's fine-tuning", low=0)
    max_grad_norm: float = flag(1.0, "training", "clip the gradient's global norm; 0: never", low=0)
    class_weights: str = flag("none", "training", "balanced: rare classes count as much as frequent ones",
                              choices=["none", "balanced"])
    label_smoothing: float = flag(0.0, "training", "share of each label that is spread over all classes", low=0,
                                  below=1)
    ema: float = flag(0.0, "training", "decay (0.999) of an average of the weights, scored and saved beside them; 0: "
                      "none", low=0, below=1)
    swa: float = flag(0.0, "training", "the same, but their mean over this last share of the updates (0.25)", low=0,
                      high=1)
    early_stopping: int = flag(0, "training", "stop after so many evaluations in a row without a new best; 0: never",
                               low=0)
    metric: str = flag("auto", "training", "chooses `best`: accuracy, loss, macro_f1 or map; auto: accuracy, "
                       "or map with multi-label", choices=list(METRICS), metavar="METRIC")
    seed: int = flag(42, "training", "decides data order, crops, dropout and the initial values", low=0)

    device: str = flag("auto", "device", "auto, cpu or cuda", choices=["auto", "cpu", "cuda"])
    precision: str = flag("auto", "device", "auto: bf16 where it is native, else fp16 on a GPU and fp32 on a CPU",
                          choices=["auto", "fp32", "bf16", "fp16"])
    fp16: bool = flag(False, "device", "short for --precision fp16")
    bf16: bool = flag(False, "device", "short for --precision bf16")
    loss_scale: float = flag(0.0, "device", "fp16: a fixed loss scale; 0: dynamic", low=0)
    compile: str = flag("auto", "device", "torch.compile of the blocks; auto: on GPUs, in runs long enough for it",
                        choices=["auto", "on", "off"])
    gradient_checkpointing: bool = flag(False, "device", "compute blocks anew on the way back: less memory, more time")
    deterministic: bool = flag(False, "device", "only kernels that give the same bits each time (a CPU's do anyway)")
    fp16_opt_level: str = flag("O2", "device", "obsolete (apex); accepted and ignored")
    local_rank: int = flag(-1, "device", "which GPU; -1: the first", low=-1)

    name: str | None = flag(None, "output", "of the run (default: DATASET-MODEL-SIZE)", type=str)
    output_dir: str = flag("output", "output", "the run's folder is OUTPUT_DIR/NAME")
    overwrite: bool = flag(False, "output", "replace a run of the same name")
    resume: str | None = flag(None, "output", "continue a run as if nothing had happened; auto: where there is a state "
                              "(default: start)", type=str, metavar="FOLDER|auto")
    save_every: int = flag(0, "output", "updates between savings of the state; 0: every 5 minutes. Evaluations and "
                           "signals save, too", low=0)
    dry_run: bool = flag(False, "output", "check everything, show the effective recipe, and stop")
    summary: bool = flag(False, "output", "show the model's layers, shapes, parameters and FLOPs, and stop")
    eval_every: int = flag(100, "output", "updates between evaluations; 0: an epoch. One is always at the end",
                           low=0)
    eval_batch_size: int = flag(64, "output", "images at a time in an evaluation", low=1)
    no_report: bool = flag(False, "output", "no report.html and curves (python -m utils.report RUN makes them later)")
    debug: bool = flag(False, "output", "show the traceback of an error")

    def __post_init__(self):
        """ValueError: a setting that no run can have, with the numbers."""
        for f in fields(self):
            _check_range(f.name, getattr(self, f.name), *f.metadata["range"])
        parts = 1 if self.gradient_accumulation_steps == "auto" else self.gradient_accumulation_steps
        _check_range("gradient_accumulation_steps", parts, 1)
        if self.seed >= 2**63:
            raise ValueError(f"--seed is {self.seed}; it must be below 2^63.")
        if self.name is not None and (Path(self.name).is_absolute() or ".." in Path(self.name).parts or not self.name):
            raise ValueError(f"--name '{self.name}' would leave --output_dir; give a plain name.")
        if self.ema and self.swa:
            raise ValueError("--ema and --swa are two averages of the same weights: choose one.")
        if self.pad_crop and self.min_area is not None:
            raise ValueError("--pad_crop crops instead of --min_area's box: choose one.")
        if self.train_batch_size % parts:
            raise ValueError(f"--train_batch_size {self.train_batch_size} cannot be split into "
                             f"--gradient_accumulation_steps {parts} equal parts.")
        if self.momentum_dtype != "float32" and self.optimizer != "sgd":
            raise ValueError(f"--momentum_dtype {self.momentum_dtype} is for sgd's momentum; --optimizer is "
                             f"{self.optimizer}.")
        asked = {"fp16" if self.fp16 else None, "bf16" if self.bf16 else None,
                 self.precision if self.precision != "auto" else None} - {None}
        if len(asked) > 1:
            raise ValueError(f"Two precisions were asked for: {' and '.join(sorted(asked))}. Choose one.")

    def in_steps(self, images: int) -> "Settings":
        """Epochs as updates, for so many training images: the nearest whole number."""
        epoch = images / self.train_batch_size
        steps = max(round(self.num_epochs * epoch), 1) if self.num_epochs else self.num_steps
        warmup = round(self.warmup_epochs * epoch) if self.warmup_epochs else self.warmup_steps
        return replace(self, num_steps=steps, warmup_steps=warmup)

    def evaluates(self, step: int, images: int) -> bool:
        """Whether an evaluation follows update number `step`: with `eval_every` 0, where it completes an epoch."""
        if self.eval_every:
            return step % self.eval_every == 0
        return step * self.train_batch_size // images > (step - 1) * self.train_batch_size // images


def _check_range(name: str, value, low=None, below=None, high=None) -> None:
    """ValueError: outside of low <= value < below, or <= high."""
    if not isinstance(value, int | float) or low is None:  # not a number, not given, or nothing to check
        return
    if not low <= value < (float("inf") if below is None else below) or (high is not None and value > high):
        ends = below if high is None else high
        where = (f"at least {low}" if low == 1 else f"{low} or more") if ends is None else (
            f"{low} to {ends}" if isinstance(value, int) else f"between {low} and {ends}")
        raise ValueError(f"--{name} is {value}; it must {'lie ' if 'between' in where else 'be '}{where}.")


class Parser(argparse.ArgumentParser):
    """argparse with `-` for `_`, errors of one sentence, and the nearest name for a mistyped flag."""

    def parse_args(self, args=None, namespace=None):
        args = [_underscored(arg) for arg in args]
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            name = unknown[0].split("=")[0]
            flags = [s for s in self._option_string_actions if s not in ("-h", "--help")]
            near = [flag for flag in GUESSED.get(name, ()) if flag in flags] or difflib.get_close_matches(
                name, flags, n=1, cutoff=0.7)
            what = f"flag {name}" if name.startswith("-") else f"argument '{name}' without a flag"
            self.error(f"There is no {what}" + (f": did you mean {' and '.join(near)}?" if near else ". See --help."))
        return found

    def error(self, message):
        self.exit(2, f"error: {message}\n")


def _underscored(arg: str) -> str:
    name, equals, value = arg.partition("=")
    return name[:2] + name[2:].replace("-", "_") + equals + value if arg.startswith("--") else arg


def parser() -> Parser:
    p = Parser(prog="train.py", allow_abbrev=False, formatter_class=_OneLine,
               usage="python train.py [--FLAG VALUE ...]",
               description="Fine-tune a Vision Transformer of Google's on your images.",
               epilog="Example: python train.py --model_type ViT-B_16 --pretrained_dir checkpoint/ViT-B_16.npz --fp16")
    groups = {}
    for f in fields(Settings):
        group = f.metadata["group"]
        if group not in groups:
            groups[group] = p.add_argument_group(group)
        text, options = f.metadata["help"], dict(f.metadata["options"])
        if isinstance(f.default, bool):
            options["action"] = "store_true"
        else:
            options.setdefault("type", str if f.default is None else type(f.default))
            options.setdefault("metavar", "|".join(options.get("choices", [options["type"].__name__])))
            if f.default is not None:
                text += f" (default: {f.default})"
        groups[group].add_argument(f"--{f.name}", *f.metadata["also"], dest=f.name, default=argparse.SUPPRESS,
                                   help=text.replace("%", "%%"), **options)
    return p


class _OneLine(argparse.HelpFormatter):
    def __init__(self, prog):
        super().__init__(prog, max_help_position=40, width=150)


def given(argv: list[str]) -> dict:
    """The flags of a command line, by name; what --model means is spelled out."""
    flags = vars(parser().parse_args(argv))
    if "model" in flags:
        if "model_type" in flags:
            raise ValueError("--model and --model_type both name a model: choose one.")
        flags["model_type"] = LEARNERS[flags["model"]]
        flags.setdefault("pretrained_dir", "none")
        if flags.get("resume", "auto") == "auto" and flags["pretrained_dir"] == "none":
            flags.setdefault("recipe", "scratch")
    return flags


def resolve(given: dict) -> Settings:
    """The settings of a new run: what was given by hand, else the recipe's value, else the default.

    ValueError: two flags of which only one can be meant, or a value that no run can have.
    """
    _check_lengths(given)
    preset = dict(RECIPES[given.get("recipe", "vit-pytorch")])
    for one, other in (("num_steps", "num_epochs"), ("warmup_epochs", "warmup_steps"), ("min_area", "pad_crop")):
        if one in given:
            preset.pop(other, None)
    settings = {**preset, **given}
    if settings.get("labels") and "dataset" not in settings:
        settings["dataset"] = str(Path(settings["labels"]).parent)
    if settings.get("num_epochs"):
        settings.setdefault("eval_every", 0)
        if "warmup_steps" not in settings:
            settings.setdefault("warmup_epochs", WARMUP * settings["num_epochs"])
    if settings.get("recipe") == "paper":
        model = settings.get("model_type", "auto")
        model = Path(settings.get("pretrained_dir") or "ViT-B_16").stem if model == "auto" else model
        model = model.removesuffix("-224").removesuffix("-384")
        settings.setdefault("learning_rate", PAPER_LR.get((model, settings.get("dataset", "cifar10")), 3e-2))
    if settings.get("recipe") == "scratch":
        settings.setdefault("learning_rate", scratch_lr(settings["train_batch_size"], settings["optimizer"]))
        if settings["optimizer"] != "adamw" and "weight_decay" not in given:
            settings["weight_decay"] = 0.0  # others would draw biases and norms to zero, too
        if "num_steps" in settings and "warmup_epochs" not in settings:
            settings.setdefault("warmup_steps", round(WARMUP * settings["num_steps"]))
    return Settings(**settings)


def _check_lengths(given: dict) -> None:
    """ValueError: one length in two ways, or none at all."""
    for one, other in (("num_steps", "num_epochs"), ("warmup_steps", "warmup_epochs")):
        if one in given and other in given:
            raise ValueError(f"--{one} and --{other} both say how long: choose one.")
    if given.get("num_epochs") == 0:
        raise ValueError("--num_epochs is 0: give more, or --num_steps.")


def scratch_lr(batch: int, optimizer: str = "adamw") -> float:
    """Of --recipe scratch: 1e-3 for batches of 128 (Lee et al. 2021) and above, in proportion less for smaller ones;
    sgd keeps the default."""
    return 3e-2 if optimizer == "sgd" else 1e-3 * min(batch / 128, 1)


def proceed(stored: dict, given: dict) -> tuple[Settings, dict[str, tuple]]:
    """The settings of a run that is continued, and what of them is new: {name: (before, now)}.

    stored: those of the run, with "resolved", what its automatic choices were; given: the flags of the command line.
    ValueError: a setting that decides the run's numbers is another one than before, or there are fewer steps.
    """
    _check_lengths(given)
    known = {f.name for f in fields(Settings)}
    before = {name: tuple(value) if isinstance(value, list) else value for name, value in stored.items()
              if name in known}
    resolved = {name: tuple(value) if isinstance(value, list) else value for name, value in
                stored["resolved"].items()}
    resolved["precision"] = SHORT[resolved["precision"]]
    resolved.pop("gradient_accumulation_steps", None)  # what auto began with: a number given now is another setting
    changed = {name: (before.get(name), value) for name, value in given.items()
               if value not in (before.get(name), resolved.get(name))}
    if "pretrained_dir" in changed and Path(given["pretrained_dir"]).name == resolved["pretrained_dir"]:
        del changed["pretrained_dir"]  # wherever it lies now: the state has the weights
    changed.pop("model", None)  # which is spelled out
    refused = [f"--{name} {old} -> {new}" for name, (old, new) in changed.items()
               if name not in FREE and not (name in GROWS and new > (old or 0))]
    if refused:
        raise ValueError(f"A run goes on with the settings that it began with: {', '.join(refused)}. Leave them out or "
                         "start another run with --name; only --num_steps and --num_epochs may grow, and the batch "
                         "split, the patience and how often it is evaluated and saved are free.")
    settings = Settings(**{**before, **{name: value for name, value in given.items() if name in changed},
                           **({"num_epochs": 0.0} if "num_steps" in changed else {})})
    return settings, changed


def parse(argv: list[str] | None) -> Settings:
    """The settings of a command line that starts a new run."""
    return resolve(given(sys.argv[1:] if argv is None else argv))
