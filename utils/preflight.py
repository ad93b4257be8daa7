"""What is checked and said before any time of the device is spent: data, recipe, memory, disk."""

import logging
import time
from collections import defaultdict
from dataclasses import fields, replace
from itertools import combinations
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from models.fill import native_size
from utils import resources, trainable
from utils.data import Data, Split
from utils.device import Computing, training_seconds
from utils.fitting import Fitting, divisors, in_words
from utils.images import fingerprint, fingerprints
from utils.optim import lr_at
from utils.resources import amount

log = logging.getLogger(__name__)

SAMPLE = 200  # files of a part that are decoded where not all are: 1 % of broken ones show with 87 % (1 - 0.99^200)
FEW = 5       # images: of fewer, not one is left for the test part when a fifth is held out
RARE = 0.02   # of the largest class: whoever never predicts a smaller one loses less accuracy than that
FAR = 3       # times outside of a range before it is said

# (optimiser, from weights) -> lowest, highest and a usual learning rate, and whose they are.
RATES = {
    # Dosovitskiy et al. 2021, Table 4 (CIFAR, Pets, Flowers .001 to .03, ImageNet .003 to .06), batch 512
    ("sgd", True): (1e-3, 6e-2, 1e-2, "the paper's fine-tuning with sgd took"),
    ("adam", True): (1e-5, 1e-3, 1e-4, "fine-tuning with adam usually takes"),
    ("adamw", True): (1e-5, 1e-3, 1e-4, "fine-tuning with adamw usually takes"),
    # From scratch: Table 3 took Adam's 1e-3 to 3e-3 at batch 4096; nobody published one of sgd, so this is wide
    ("sgd", False): (1e-3, 3e-1, 3e-2, "training from scratch with sgd takes"),
    ("adam", False): (1e-4, 3e-3, 1e-3, "training from scratch with adam takes"),
    ("adamw", False): (1e-4, 3e-3, 1e-3, "training from scratch with adamw takes"),
}
BATCH, LARGEST = 512, 4096  # these belong to the first; up to the second the rate may grow with it (Goyal et al. 2017)
SMALL = 1_000_000  # images: Dosovitskiy et al. 2021 (section 4.3) find even ImageNet's 1.3 M too few for large models
EXPECT = ("from random weights on {images:,} images, far less than from pretrained ones. Published for CIFAR-10's "
          "50,000: a small ViT reaches 75 to 79 % in 50 epochs of a plain recipe and 91 % in 200 of a strong one; "
          "ViT-B_16 fine-tuned 99 %. Larger models gain nothing here.")
# They decide nothing, or under another name.
NOT_SHOWN = {"debug", "dry_run", "summary", "model", "overwrite", "no_report", "fp16", "bf16", "fp16_opt_level"}


# --- Data ------------------------------------------------------------------------------------------------------------

def check_data(dataset: Data, settings, size: tuple[int, int]) -> Data:
    """The data as it will be used: looked at, and with `skip_unreadable` without what cannot be read.

    Files are decoded: SAMPLE of each part, or all with `check_data` or `skip_unreadable`. What the labels alone tell
    (classes without or with few images) is always said, images that occur twice only with `check_data`.
    size: (H, W) at which the model sees them. ValueError: a file is unreadable, or a class has nothing else.
    """
    started, seen = time.perf_counter(), {}
    whole = settings.check_data or settings.skip_unreadable
    for part, split in _parts(dataset).items():
        seen[part] = _look(split, whole, settings.check_data)
    broken = {part: {i: found for i, found in looks.items() if isinstance(found, str)} for part, looks in seen.items()}
    if any(broken.values()):
        if not settings.skip_unreadable:
            raise ValueError(_refusal(dataset, broken, sum(map(len, seen.values()))))
        dataset, seen = _without(dataset, broken, seen)
    _check_classes(dataset, settings)
    _check_sizes(dataset.train, seen["train"], size)
    if settings.check_data:
        copies = _check_copies(dataset, seen)
        log.info("checked  %s images in %.1f s: all can be read, %s", f"{sum(map(len, seen.values())):,}",
                 time.perf_counter() - started, f"{copies:,} are copies of others" if copies else "no two are equal")
    return dataset


def _parts(dataset: Data) -> dict[str, Split]:
    return {part: split for part in ("train", "val", "test") if (split := getattr(dataset, part)) is not None}


def _look(split: Split, whole: bool, compare: bool) -> dict:
    """Position -> fingerprint, or the sentence on why it is unreadable; of a tensor only where images are compared."""
    if isinstance(split.images, Tensor):
        return dict(enumerate(map(fingerprint, split.images))) if compare else {}
    last = len(split) - 1
    places = range(len(split)) if whole or last < SAMPLE else [last * i // (SAMPLE - 1) for i in range(SAMPLE)]
    return dict(zip(places, fingerprints([split.images[i] for i in places], split.channels)))


def _refusal(dataset: Data, broken: dict, looked: int) -> str:
    """The sentence on unreadable images: the first one's reason, names and number of the others, what to do."""
    names = [_name(dataset, part, i) for part, found in broken.items() for i in found]
    first = next(sentence for found in broken.values() for sentence in found.values()).removesuffix(".")
    if len(names) == 1:
        return f"{first}, or leave it out with --skip_unreadable."
    return (f"{len(names)} of the {looked:,} images that were looked at cannot be read ({_some(names, 5)}). "
            f"{first}, or leave all of them out with --skip_unreadable.")


def _without(dataset: Data, broken: dict, seen: dict) -> tuple[Data, dict]:
    """Data and looks without the unreadable images, said once. ValueError: a class or a part has no others."""
    for part, split in _parts(dataset).items():
        if not broken[part]:
            continue
        kept = [i for i in range(len(split)) if i not in broken[part]]
        left = split.subset(kept)
        gone = torch.nonzero((_counts(split) > 0) & (_counts(left) == 0)).flatten().tolist() if part == "train" else []
        if gone or not kept:
            what = f"class {split.classes[gone[0]]}" if gone else f"the {part} part"
            raise ValueError(f"{next(iter(broken[part].values()))} No image of {what} can be read, so leaving them out "
                             "leaves nothing.")
        dataset = replace(dataset, **{part: left})
        seen[part] = dict(enumerate(seen[part][i] for i in kept))
    sentences = [sentence for found in broken.values() for sentence in found.values()]
    log.warning("%d unreadable images are left out: %s", len(sentences),
                _some([sentence.split(": replace")[0].removesuffix(".") for sentence in sentences], 5, "; ") + ".")
    return dataset, seen


def _check_classes(dataset: Data, settings) -> None:
    """Warnings that the labels alone give reason for."""
    classes, train, test = dataset.train.classes, _counts(dataset.train), _counts(dataset.test)

    def named(which: Tensor) -> tuple[int, str]:
        return int(which.sum()), _some([classes[i] for i in which.nonzero().flatten().tolist()], 5)
    if (train == 0).any():
        log.warning("%d classes have no training image (%s) and will not be predicted: add some, or remove the class.",
                    *named(train == 0))
    few = (train > 0) & (train < FEW)
    if few.any():
        log.warning("%d classes (%s) have fewer than %d training images: add some, or merge them with others.",
                    *named(few), FEW)
    rare = (train > 0) & (train < RARE * train.max())
    if rare.any() and settings.class_weights == "none":
        log.warning("%d classes (%s) have less than %g %% of the images of the largest, %s (%s): accuracy hardly "
                    "notices them. Try --class_weights balanced with --metric macro_f1.", *named(rare), 100 * RARE,
                    classes[int(train.argmax())], f"{int(train.max()):,}")
    if ((train > 0) & (test == 0)).any():
        log.warning("No image in the test part for %d of train's classes (%s): its scores say nothing about them.",
                    *named((train > 0) & (test == 0)))


def _check_sizes(split: Split, looks: dict, size: tuple[int, int]) -> None:
    """Says where most images are smaller than what the model sees."""
    sizes = [tuple(split.images.shape[2:])] if isinstance(split.images, Tensor) else [s.size for s in looks.values()]
    usual = tuple(int(median(sides)) for sides in zip(*sizes))
    if all(n < s for n, s in zip(usual, size)):
        log.info("Images of %d x %d px (median) are enlarged to %d x %d, as the paper does with CIFAR's; a smaller "
                 "--img_size is faster.", *usual, *size)


def _check_copies(dataset: Data, seen: dict) -> int:
    """Warns of equal images in two parts, and in train under different labels; returns how many copies there are."""
    places = {part: defaultdict(list) for part in seen}
    for part, looks in seen.items():
        for i, found in looks.items():
            places[part][found.digest].append(i)
    for one, other in combinations(places, 2):
        both = [(places[one][digest][0], i) for digest, found in places[other].items() if digest in places[one]
                for i in found]
        if both:
            pairs = [f"{_name(dataset, one, i)} = {_name(dataset, other, j)}" for i, j in both]
            log.warning("%d of %s %s images are in %s, too, pixel for pixel (%s): its scores count what was seen "
                        "before. Remove them from one of the two.", len(both), f"{len(getattr(dataset, other)):,}",
                        other, one, _some(pairs, 3))
    labels = dataset.train.labels
    torn = [found for found in places["train"].values() if any((labels[i] != labels[found[0]]).any() for i in found)]
    if torn:
        pairs = [" = ".join(_name(dataset, "train", i) for i in found[:2]) for found in torn]
        log.warning("%d images are in train more than once and under different labels (%s): keep each under one.",
                    len(torn), _some(pairs, 3))
    total = sum(map(len, seen.values()))
    return total - len({digest for found in places.values() for digest in found})


def _counts(split: Split) -> Tensor:
    """Images of each class, (C,)."""
    return split.labels.sum(0).long() if split.labels.ndim == 2 else split.labels.bincount(minlength=len(split.classes))


def _name(dataset: Data, part: str, i: int) -> str:
    images = getattr(dataset, part).images
    return f"{part}[{i}]" if isinstance(images, Tensor) else "/".join(Path(images[i]).parts[-3:])


def _some(names: list[str], most: int, comma: str = ", ") -> str:
    return comma.join(names[:most]) + (f" and {len(names) - most:,} more" if len(names) > most else "")


# --- The recipe ------------------------------------------------------------------------------------------------------

def summarise(settings, dataset: Data, model, origin: dict, computing: Computing, folder: Path, fitting: Fitting,
              step: int = 0) -> None:
    """What is about to happen, and what of it looks unwise. step: after how many updates a run is continued."""
    s, images, device = settings, len(dataset.train), computing.device
    held = f", {len(dataset.val):,} val" if dataset.val else ""
    needs = _needs(model, s, computing, fitting.parts)
    free = resources.free_memory(device)
    for what, text in {
        "model": f"{model.config.name}, {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, "
                 f"{model.img_size[0]} x {model.img_size[1]} px, {model.config.in_chans} channels, "
                 f"dropout {model.config.dropout_rate:g}",
        "weights": (f"of step {step}; at first " * bool(step)) + (
            f"{origin['name']} (sha256 {origin['sha256'][:12]}), new head" if origin else "random: from scratch"),
        "data": f"{dataset.name}: {images:,} train{held}, {len(dataset.test):,} {dataset.test_name}, "
                f"{len(dataset.train.classes)} classes",
        "batch": f"{_batch(s.train_batch_size, fitting)}; "
                 f"{s.num_steps:,} steps are {s.num_steps * s.train_batch_size / images:.3g} epochs",
        "recipe": f"{s.optimizer}{', bfloat16 momentum' * (s.momentum_dtype == 'bfloat16')}, LR {s.learning_rate:g} "
                  f"after {s.warmup_steps} steps of warm-up, {s.decay_type}, clip {s.max_grad_norm:g}, "
                  f"weight decay {s.weight_decay:g}, seed {s.seed}",
        **({"extras": extras} if (extras := _extras(s, model)) else {}),
        **({"trains": trainable.in_words(model, s.train)} if s.train != "all" else {}),
        "device": f"{torch.cuda.get_device_name(device) if device.type == 'cuda' else 'cpu'}, "
                  f"{computing.in_words()['precision']}, about {amount(needs.total)} of memory"
                  + (f" ({amount(free)} free)" if free else ""),
        "output": str(folder),
    }.items():
        log.info("%-8s %s", what, text)
    if s.fp16_opt_level != "O2":
        log.info("--fp16_opt_level was apex's and decides nothing any more: --fp16 is PyTorch's own autocast.")
    if dataset.val is None:
        log.warning("Nothing is held out: `best` will be picked on the test set, as ViT-pytorch does. For an honest "
                    "choice use --val_fraction 0.1.")
    if not origin and not step and images < SMALL:
        log.info("%-8s %s", "expect", EXPECT.format(images=images))
        if not s.dry_run:  # which tells it of every run
            log.info("%-8s %s", "", _time(s, model, computing))
    _check_recipe(settings, images, model, bool(origin))
    _check_memory(settings, model, computing, fitting.parts)


def _time(s, model, computing: Computing) -> str:
    """How long the training will take, roughly."""
    minutes = training_seconds(model, s.num_steps * s.train_batch_size, computing) / 60
    hours = f"{minutes / 60:,.0f} hours" if minutes > 600 else f"{minutes / 60:.1f} hours"
    words = hours if minutes > 90 else f"{minutes:.0f} minutes" if minutes > 2 else "a minute or two"
    return f"roughly {words} of training here"


def _extras(s, model) -> str:
    """What is done to images, labels and weights beyond the paper's recipe, in words; empty for nothing."""
    view = {"pad_crop": f"crops out of {s.pad_crop} px around", "mixup": f"mixup {s.mixup:g}",
            "randaugment": f"RandAugment {s.randaugment} of magnitude {s.magnitude}", "cutmix": f"CutMix {s.cutmix:g}",
            "label_smoothing": f"label smoothing {s.label_smoothing:g}", "ema": f"EMA {s.ema:g}",
            "swa": f"mean of the weights over the last {100 * s.swa:g} % of the steps",
            "early_stopping": f"stops after {s.early_stopping} evaluations without a new best"}
    depth, fixed = model.config.drop_path_rate, model.config.pos_embed
    return ", ".join([words for name, words in view.items() if getattr(s, name)]
                     + [f"stochastic depth {depth:g}"] * bool(depth)
                     + [f"positions {fixed}"] * (fixed != "learned"))


def _batch(images: int, fitting: Fitting) -> str:
    """A global batch and its split; one that is still to be tried is said when it is found."""
    if not fitting.automatic:
        return f"{images} = {fitting.parts} x {images // fitting.parts}" if fitting.parts > 1 else f"{images}"
    return f"{in_words(images, fitting.parts)} (auto)" if fitting.settled else f"{images} in as few parts as fit (auto)"


def _check_recipe(s, images: int, model, pretrained: bool) -> None:
    """Warnings on numbers that do not fit one another, or the paper."""
    if (used := native_size(model.config, model.grid)) != model.img_size:
        log.warning("Images of %d x %d px are no whole number of patches: what is right of or below %d x %d is not "
                    "looked at, as in Google's code.", *model.img_size, *used)
    if s.warmup_steps >= s.num_steps:
        log.warning("The warm-up of %d steps is not over when the run of %d ends, and the learning rate stays small: "
                    "try --warmup_steps %d.", s.warmup_steps, s.num_steps, s.num_steps // 20)
    if s.train_batch_size > images:
        log.warning("A batch of %d shows some of the %d training images more than once: try a smaller "
                    "--train_batch_size.", s.train_batch_size, images)
    low, high, usual, who = RATES[s.optimizer, pretrained]
    scale = min(s.train_batch_size, LARGEST) / BATCH
    above = s.learning_rate > FAR * high * max(scale, 1)
    if above or s.learning_rate < low * min(scale, 1) / FAR:
        log.warning("--learning_rate %g is far %s what %s (%g to %g): try --learning_rate %g.", s.learning_rate,
                    "above" if above else "below", who, low, high, usual)


def _needs(model, s, computing: Computing, parts: int) -> resources.Memory:
    return resources.memory(model, s, computing.precision, computing.device, computing.processes, parts)


def _check_memory(s, model, computing: Computing, parts: int) -> None:
    """Warns where the estimate for so many micro-batches is beyond what is free, with the split that would fit."""
    def needs(parts: int) -> int:
        return _needs(model, s, computing, parts).total
    free = resources.free_memory(computing.device)
    if free is None or needs(parts) <= free:
        return
    fitting = (n for n in divisors(s.train_batch_size // computing.processes) if n > parts and needs(n) <= free)
    advice = next((f"try --gradient_accumulation_steps {n}" for n in fitting), "try a smaller --img_size or model")
    log.warning("A training step takes about %s of memory, and %s are free: %s.", amount(needs(parts)), amount(free),
                advice)


# --- Room, and the whole picture -------------------------------------------------------------------------------------

def check_room(settings, model, folder: Path) -> None:
    """ValueError: the outputs cannot fit on the disk. A warning where they do so only just."""
    need, free = resources.disk(model, settings), resources.free_disk(folder)
    numbers = f"The outputs of this run take up to {amount(need)}, and {amount(free)} are free where {folder} will lie"
    if need > free:
        raise ValueError(f"{numbers}. Make room, or choose another --output_dir.")
    if 1.5 * need > free:
        log.warning("%s: make room before something else fills it.", numbers)


def dry_run(settings, dataset: Data, model, computing: Computing, folder: Path, fitting: Fitting) -> None:
    """All that `summarise` leaves out: data by class, the course of the run, its needs, every setting."""
    s, per_epoch = settings, len(dataset.train) / settings.train_batch_size
    needs = _needs(model, s, computing, fitting.parts)
    sections = {
        "Data": [(part, _portrait(split)) for part, split in _parts(dataset).items()],
        "Course": [("epochs", f"{s.num_steps / per_epoch:.3g}, of {per_epoch:.4g} steps each"),
                   ("learning rate", _rates(s)),
                   ("evaluations", (f"{-(-s.num_steps // s.eval_every):,}, every {s.eval_every:,} steps"
                                    if s.eval_every else "after each epoch")
                    + f" and at the end, on {'val' if dataset.val else 'test'}")],
        "Needs": [("time", _time(s, model, computing)),
                  ("memory", f"about {amount(needs.total)}: " + ", ".join(f"{name} {amount(size)}" for name, size in
                                                                         zip(needs._fields, needs) if size)),
                  ("disk", f"up to {amount(resources.disk(model, s))} of {amount(resources.free_disk(folder))} free")],
        "Settings (* not the default, > chosen here)": _settings(s, dataset, model, computing, folder, fitting.parts),
    }
    text = []
    for title, lines in sections.items():
        width = max(len(name) for name, _ in lines)
        text += ["", title, *(f"  {name:{width}}  {value}" for name, value in lines)]
    log.info("\n".join([*text, "", "Nothing was written. Without --dry_run this run would start, or go on."]))


def _portrait(split: Split) -> str:
    """How many images, and how they spread over the classes."""
    counts = _counts(split)
    low, high = int(counts.argmin()), int(counts.argmax())
    spread = (f"{counts[low]:,} in each" if counts[low] == counts[high] else
              f"{counts[low]:,} ({split.classes[low]}) to {counts[high]:,} ({split.classes[high]})")
    return f"{len(split):,} images of {len(split.classes):,} classes: {spread}"


def _rates(s) -> str:
    """The learning rate of the updates where its course turns."""
    steps = sorted({1, min(s.warmup_steps + 1, s.num_steps), (s.num_steps + 1) // 2, s.num_steps})
    rates = [lr_at(step - 1, base=s.learning_rate, total=s.num_steps, warmup=s.warmup_steps, decay=s.decay_type)
             for step in steps]
    return ", ".join(f"step {step:,}: {rate:.3g}" for step, rate in zip(steps, rates))


def _settings(s, dataset: Data, model, computing: Computing, folder: Path, parts: int) -> list[tuple[str, str]]:
    """(name, value with its mark) of each setting, as it was resolved."""
    config, view = model.config, dataset.view
    chosen = {"model_type": config.name, "img_size": model.img_size, "in_chans": config.in_chans, "name": folder.name,
              "dropout": config.dropout_rate, "drop_path": config.drop_path_rate, "patch_proj": config.patch_proj,
              "pos_embed": config.pos_embed, "patch_size": config.patch_size[0], "hidden_size": config.hidden_size,
              "num_layers": config.num_layers, "num_heads": config.num_heads, "mlp_dim": config.mlp_dim,
              "min_area": None if s.pad_crop else view.min_area, "no_flip": s.no_flip or not view.flip,
              "gradient_accumulation_steps": parts, **computing.in_words(),
              "metric": ("map" if dataset.train.multi_label else "accuracy") if s.metric == "auto" else s.metric}
    lines = []
    for f in fields(s):
        value = getattr(s, f.name)
        open_yet = value in (None, "auto", False) and value != chosen.get(f.name, value)
        shown = chosen[f.name] if open_yet else value
        shown = ",".join(map(str, shown)) if isinstance(shown, tuple) else "-" if shown is None else f"{shown}"
        if f.name not in NOT_SHOWN:
            lines.append((f.name, f"{'>' if open_yet else '*' if value != f.default else ' '} {shown}"))
    return lines
