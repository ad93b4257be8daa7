"""Flags -> what a run starts from: settings, folder, model and weights, of a new run or of one that is continued."""

import json
import logging
import os
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from ml_collections import FrozenConfigDict

from models import configs, exchange, huggingface, npz, sources
from models.fill import with_channels
from models.modeling import VisionTransformer
from utils import state, trainable
from utils.data import NAMED, Data, Split, View, check_there
from utils.device import Computing
from utils.optim import lr_at
from utils.progress import Progress
from utils.runs import PATHS, Run, check_free, data_of, sha256, weights_of
from utils.settings import SHORT, SIZES, Settings, proceed, resolve
from utils.state import State

log = logging.getLogger(__name__)

UNPUBLISHED = ("ViT-demo", "ViT-CIFAR")  # ours, for 32 px

# Settings which, changed on the way, change the numbers that follow; what is said of them.
CHANGES = {"num_steps": ": the learning rate is planned anew from here, and this is no longer the run that it was",
           "gradient_accumulation_steps": ": equal up to rounding, with dropout other masks"}


@dataclass(frozen=True)
class Opening:
    """What a run starts from. No tensor of the weights is read yet."""
    settings: Settings
    folder: Path
    config: FrozenConfigDict
    size: tuple[int, int]
    weights: Path | None        # None: from scratch, or in `content`
    where: dict[str, str | None]  # the absolute paths of PATHS, so that the current folder may be another one next time
    content: dict | None = None  # the state that is continued; None: a new run
    changed: dict | None = None  # settings that are others than before, {name: (before, now)}

    def in_steps(self, images: int) -> "Opening":
        """The same with epochs as updates, for so many training images. ValueError: fewer than were planned."""
        settings, changed = self.settings.in_steps(images), self.changed
        before = self.content["about"]["settings"]["num_steps"] if self.content else 0
        if settings.num_steps < before:
            raise ValueError(f"--num_epochs {settings.num_epochs:g} are {settings.num_steps} updates, and "
                             f"{self.folder} was planned for {before}: a run can only grow.")
        if self.content and settings.num_steps != self.settings.num_steps:
            changed = {**changed, "num_steps": (self.settings.num_steps, settings.num_steps)}
        return replace(self, settings=settings, changed=changed)

    def build_model(self, num_classes: int) -> tuple[VisionTransformer, dict]:
        """The model, of which trains what is to, and the file it began with: {"name", "sha256"}, empty from scratch. A
        new run's has a new head."""
        model, origin = self._whole_model(num_classes)
        trainable.choose(model, self.settings.train, seed=self.settings.seed)
        return model, origin

    def _whole_model(self, num_classes: int) -> tuple[VisionTransformer, dict]:
        if self.content:
            return VisionTransformer(self.config, self.size, num_classes), self.content["about"]["finetuned_from"]
        if self.weights is None:
            torch.manual_seed(self.settings.seed)  # of the initial values
            return VisionTransformer(self.config, self.size, num_classes), {}
        model = exchange.load(self.weights, img_size=self.size, num_classes=num_classes, config=self.config,
                              in_chans=self.config.in_chans)
        file = huggingface.weights_in(self.weights) if self.weights.is_dir() else self.weights
        return model, {"name": self.weights.name, "sha256": sha256(file)}

    def computing(self) -> Settings:
        """The settings with the precision that the run began with, compiled or not, on whatever machine it goes on."""
        if not self.content:
            return self.settings
        resolved = self.content["about"]["settings"]["resolved"]
        return replace(self.settings, precision=SHORT[resolved["precision"]], fp16=False, bf16=False,
                       compile=resolved.get("compile", "off"))

    def check_same(self, dataset: Data, computing: Computing) -> None:
        """ValueError: the data, or what the device computes in, is not what the run began with. A warning: it computes
        with others, so that the sums have another order."""
        if not self.content:
            return
        about, resolved = self.content["about"], self.content["about"]["settings"]["resolved"]
        if (now := computing.in_words()["precision"]) != (then := resolved["precision"]):
            raise ValueError(f"{self.folder} computes in {then}, and this device in {now}: continue it where it began.")
        here = computes_with(computing)
        others = [f"{name} {resolved.get(name)} then, {now} now" for name, now in here.items()
                  if now != resolved.get(name)]
        if others:
            log.warning("From here on this run is equal to an unbroken one up to rounding only, with dropout not even "
                        "that: %s.", "; ".join(others))
        if about["fingerprint"] == dataset.fingerprint():
            return
        before, there = about["classes"], list(dataset.train.classes)
        what = (f"{len(before)} classes then, {len(there)} now" if len(before) != len(there) else
                "other classes" if before != there else "images were added, removed, renamed, relabelled or changed")
        raise ValueError(f"The data is not that with which {self.folder} began ({what}). Bring it back (--dataset says "
                         "where it is), or start another run.")

    def about(self, dataset: Data, model, origin: dict, view: View, computing: Computing, micro_batches: int) -> dict:
        """What a run says of itself in its state and in the header of its weights, scores apart; plain values."""
        if self.content:
            before = self.content["about"]
            changes = {name: now for name, (_, now) in self.changed.items() if name in CHANGES}
            again = {"step": self.step, "time": round(time.time(), 3), **changes}
            continued = [*before["settings"].get("continued", ()), again]
            now = {**asdict(self.settings), "resolved": before["settings"]["resolved"]}
            return {**before, "where": self.where, "settings": {**now, "continued": continued}}
        resolved = {"name": self.folder.name, "model_type": model.config.name, "img_size": list(model.img_size),
                    "in_chans": model.config.in_chans, "dropout": model.config.dropout_rate,
                    "drop_path": model.config.drop_path_rate, "patch_proj": model.config.patch_proj,
                    "pos_embed": model.config.pos_embed, "pretrained_dir": origin.get("name", "none"),
                    "metric": best_by(self.settings, dataset.train), "train_images": len(dataset.train),
                    "gradient_accumulation_steps": micro_batches, **computing.in_words(), **computes_with(computing),
                    **asdict(view)}
        several = {"multi_label": True} if dataset.train.multi_label else {}
        return {"classes": list(dataset.train.classes), "finetuned_from": origin, "fingerprint": dataset.fingerprint(),
                "settings": {**asdict(self.settings), "resolved": resolved}, "where": self.where, **several}

    @property
    def step(self) -> int:
        return self.content["step"] if self.content else 0

    @property
    def split(self) -> dict:
        """The split into micro-batches to go on with, as the state has it; empty: to be found (`fitting.begin`)."""
        if not self.content or "gradient_accumulation_steps" in self.changed:
            return {}
        return self.content.get("split", {})

    @property
    def metrics(self) -> int | None:
        """Bytes of metrics.jsonl that belong to the state."""
        return self.content["metrics"] if self.content else None

    @property
    def command(self) -> str | None:
        """With which the run began."""
        return self.content["command"] if self.content else None

    def restore(self, now: State) -> None:
        """Brings `now` to the state that is continued. ValueError: it is that of another run."""
        if self.content:
            try:
                now.restore(self.content)
            except ValueError as error:
                raise ValueError(f"{self.folder}/{state.NEWEST} {error}.") from error
            for name in ("weights", "optimizer", "best_weights", "average"):  # they would stay in memory
                self.content.pop(name, None)

    def resume(self, run: Run, now: State, progress: Progress) -> None:
        """Brings a run's folder and what follows it to the state `now`, and says what is not as it was."""
        if not self.content:
            return
        if run.writes:
            state.settle(run.folder, self.content)
        progress.load_state_dict(self.content["progress"])
        log.info("%-8s from step %d of %d", "resumed", now.step, self.settings.num_steps)
        before = self.content["about"]["settings"]["gradient_accumulation_steps"]  # a number in states without a split
        split = self.content.get("split", {"micro_batches": before})["micro_batches"], now.fitting.parts
        changed = {**self.changed, "gradient_accumulation_steps": split}
        for name, (then, here) in changed.items():
            if name in CHANGES and then != here:
                log.info("         --%s %s -> %s%s", name, then, here, CHANGES[name])
        if "num_steps" in self.changed:
            s = self.settings
            rates = [lr_at(now.step, base=s.learning_rate, total=total, warmup=s.warmup_steps, decay=s.decay_type)
                     for total in self.changed["num_steps"]]
            log.info("         the learning rate goes on at %.3g, where it would have been %.3g", *reversed(rates))
            run.log(now.step, run_num_steps=self.settings.num_steps)
            now.best["since"] = 0  # patience begins anew
            if now.average and now.average.swa_from is not None and now.average.swa_from >= now.step:
                now.averaged = {}  # the mean is to begin later now
        if {"num_steps", "early_stopping"} & set(self.changed):
            now.finished = {}
        if run.writes and not now.finished:
            (run.folder / "predictions.csv").unlink(missing_ok=True)  # of other weights than those that come
        if run.writes and not now.averaged:
            (run.folder / "averaged.safetensors").unlink(missing_ok=True)
        run.mend(now)


def computes_with(computing: Computing) -> dict:
    """What decides the order of sums beside the settings."""
    kind = computing.device.type
    return {"device": kind, "processes": computing.processes,
            **({"threads": torch.get_num_threads()} if kind == "cpu" else {})}


def best_by(settings: Settings, split: Split) -> str:
    """The metric that chooses `best`."""
    return settings.metric if settings.metric != "auto" else "map" if split.multi_label else "accuracy"


def bare_model(given: dict) -> VisionTransformer:
    """The model that the flags ask for, with random weights, without memory (on PyTorch's meta device); nothing is
    fetched, and of the data only a named set's classes are known: others have as many as the checkpoint, or 1,000."""
    if given.get("resume", "auto") != "auto":
        raise ValueError("--summary shows the model that flags ask for: leave --resume out. `python convert.py "
                         "output/NAME` tells what a run's model is.")
    settings = resolve(given)
    _check_sizes(settings)
    path = settings.pretrained_dir
    if path != "none" and not (path and Path(path).exists()) and Path(path or "a.npz").suffix == ".npz":
        # A published file: its name is enough.
        name = Path(settings.pretrained_dir or "ViT-B_16").name.removesuffix(".npz")
        settings = replace(settings, pretrained_dir="none",
                           model_type=name if settings.model_type == "auto" else settings.model_type)
    config, size, weights = choose_model(settings)
    named = settings.dataset in NAMED and NAMED[settings.dataset].classes
    classes = named or (weights and exchange.identify(weights, config).num_classes) or 1000
    with torch.device("meta"):
        model = VisionTransformer(config, size, classes)
    trainable.choose(model, settings.train, seed=settings.seed)
    return model


def located(settings) -> dict[str, str | None]:
    """PATHS as absolute paths; a named set stays a name."""
    named = {"dataset": settings.dataset} if settings.dataset in NAMED else {}
    return {name: path and os.path.abspath(path) for name in PATHS for path in [getattr(settings, name)]} | named


def choose_model(settings: Settings) -> tuple[FrozenConfigDict, tuple[int, int], Path | None]:
    """What to start from: configuration, image size and weights (None: from scratch). No tensor is read yet."""
    asked = None if settings.model_type == "auto" else configs.get_config(settings.model_type)
    if settings.pretrained_dir == "none":
        path, config = None, resized(asked or configs.get_config("ViT-B_16"), settings)
        small = (asked and asked.name in UNPUBLISHED) or (max(config.patch_size) <= 4 and config.resnet is None)
        native = (32, 32) if small else (224, 224)
    else:
        _check_sizes(settings)
        name = settings.pretrained_dir or f"checkpoint/{asked.name if asked else 'ViT-B_16'}.npz"
        if asked and asked.name in UNPUBLISHED and not settings.pretrained_dir and not Path(name).exists():
            raise ValueError(f"There is no {name}, and nobody has published weights of {asked.name}: train it from "
                             "scratch (--recipe scratch, or --pretrained_dir none), or name a file of yours.")
        path = sources.fetch(weights_of(name))
        config, native = exchange.describe(path, asked, settings.img_size)
    config = with_channels(config, settings.in_chans or config.in_chans)
    given = {"dropout_rate": settings.dropout, "patch_proj": settings.patch_proj,
             "drop_path_rate": settings.drop_path or 0.0}  # never taken over from how the weights were made
    config = configs.replace(config, **{field: value for field, value in given.items() if value is not None})
    usual = native if max(native) <= 224 or native[0] != native[1] else (224, 224)
    return config, settings.img_size or usual, path


def _check_sizes(settings: Settings) -> None:
    """ValueError: sizes by hand for a model that begins with weights."""
    sizes = [f"--{name}" for name in SIZES if getattr(settings, name) is not None]
    if sizes and settings.pretrained_dir != "none":
        raise ValueError(f"{', '.join(sizes)}: a checkpoint decides that. Leave it out, or train from scratch "
                         "(--pretrained_dir none).")


def resized(config: FrozenConfigDict, settings: Settings) -> FrozenConfigDict:
    """`config` with the sizes that were given by hand; "custom", if no published one is built so.

    ValueError: heads that do not divide the width.
    """
    s = settings
    sizes = {"patch_size": s.patch_size and (s.patch_size,) * 2, "hidden_size": s.hidden_size, "mlp_dim": s.mlp_dim,
             "num_layers": s.num_layers, "num_heads": s.num_heads, "pos_embed": s.pos_embed}
    sizes = {name: value for name, value in sizes.items() if value is not None}
    if "hidden_size" in sizes:
        sizes.setdefault("mlp_dim", 4 * sizes["hidden_size"])
    found = configs.replace(config, **sizes)
    if found.hidden_size % found.num_heads:
        raise ValueError(f"{found.num_heads} heads cannot share a width of {found.hidden_size}: give a --num_heads "
                         "that divides --hidden_size.")
    if npz.structure(found) != npz.structure(config):
        same = (known.name for known in configs.CONFIGS.values() if npz.structure(known) == npz.structure(found))
        found = configs.replace(found, name=next(same, "custom"))
    return found


def open_run(given: dict) -> Opening:
    """What the flags given by hand ask for: a new run, or with `resume` the last sound state of one.

    ValueError: a setting that no run can have or that this one did not begin with, a folder that is taken, no state.
    """
    resume = given.get("resume")
    if resume not in (None, "auto"):
        return _continued(Path(resume), given)
    settings = resolve(given)
    if resume and settings.name and state.exists(folder := Path(settings.output_dir) / settings.name):
        return _continued(folder, given)
    check_there(settings.dataset, settings.labels)
    config, size, weights = choose_model(settings)
    trainable.parse(settings.train, config)
    pixels = "x".join(str(n) for n in dict.fromkeys(size))
    name = settings.name or f"{Path(settings.dataset).resolve().name}-{config.name}-{pixels}"
    folder = Path(settings.output_dir) / name
    if resume and state.exists(folder):
        return _continued(folder, given)
    check_free(folder, settings.overwrite or (resume and was_cut_off(folder)))
    return Opening(settings, folder, config, size, weights, located(settings))


def was_cut_off(folder: Path) -> bool:
    """Whether it holds a run of ours without anything to lose, as no state was saved: `auto` starts it again."""
    try:
        ours = "resolved" in json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False
    return ours and not any(folder.glob("*.safetensors"))


def _continued(folder: Path, given: dict) -> Opening:
    """ValueError: the folder has no sound state, or the flags ask for another run than this one."""
    if not folder.is_dir():
        near = Path(given.get("output_dir", "output")) / folder.name
        hint = f" Did you mean {near}?" if state.exists(near) else ""
        raise ValueError(f"There is no run at {folder}.{hint}" if not folder.exists() else
                         f"{folder} is a file; --resume takes the folder of a run, or auto.")
    if given.get("overwrite"):
        raise ValueError("--resume continues a run and --overwrite replaces it. Choose one.")
    if "name" in given and given["resume"] != "auto":
        named = Path(given.get("output_dir", "output")) / given["name"]
        if named.resolve() != folder.resolve():
            raise ValueError(f"--resume {folder} and --name {given['name']} name two runs ({named}). Leave --name out.")
    if not state.exists(folder):
        runs = sorted(run for run in folder.iterdir() if run.is_dir() and state.exists(run))
        if runs:
            raise ValueError(f"{folder} is no run but holds some: give one of them, such as --resume {runs[-1]}.")
        raise ValueError(f"{folder} has no {state.NEWEST}: it is no run, or was cut off before its first state was "
                         "saved. Start it again (--overwrite).")
    content = state.read(folder)
    try:
        config, size = exchange.config_in(content["record"]), tuple(content["record"]["img_size"])
        settings, changed = proceed(content["about"]["settings"], given)
        where = data_of(content["about"]["settings"], content["about"]["where"])
        where |= {name: path for name, path in located(settings).items() if name in given}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder}/{state.NEWEST} was written by another version of this toolkit "
                         f"({error.args[0]}).") from error
    if settings.num_steps < content["step"]:
        raise ValueError(f"{folder} is at step {content['step']} already.")
    try:
        check_there(where["dataset"], where["labels"])
    except (ValueError, OSError) as error:
        raise ValueError(f"The data of {folder} is not where it was: {error} Say with --dataset where it is "
                         "now.") from error
    return Opening(settings, folder, config, size, None, where, content, changed)
