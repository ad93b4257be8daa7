"""Fine-tune a Vision Transformer: parse, open, build, loop. Every batch, crop and learning rate is a function of
(settings, data, step); nothing else is remembered. `python train.py --help` lists the flags."""

import logging
import os
import shlex
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from ml_collections import FrozenConfigDict
from tqdm.contrib.logging import logging_redirect_tqdm

from models import configs, exchange, huggingface, sources
from models.fill import with_channels
from models.modeling import VisionTransformer
from utils import data
from utils.batches import EvalBatches, TrainBatches, resident
from utils.evaluation import Metrics, evaluate
from utils.optim import lr_at, make_optimizer
from utils.progress import Progress, summarise
from utils.runs import Run, check_free, sha256
from utils.settings import Settings, parse
from utils.step import attention_kernel, choose_device, choose_precision, make_scaler, train_step

log = logging.getLogger("train")


def choose_model(settings: Settings) -> tuple[FrozenConfigDict, tuple[int, int], Path | None]:
    """What to start from: configuration, image size and weights (None: from scratch). No tensor is read yet."""
    asked = None if settings.model_type == "auto" else configs.get_config(settings.model_type)
    if settings.pretrained_dir == "none":
        path, config = None, asked or configs.get_config("ViT-B_16")
        native = (32, 32) if config.name == "ViT-demo" else (224, 224)
    else:
        path = sources.fetch(settings.pretrained_dir or f"checkpoint/{asked.name if asked else 'ViT-B_16'}.npz")
        config, native = exchange.describe(path, asked, settings.img_size)
    config = with_channels(config, settings.in_chans or config.in_chans)
    if settings.dropout is not None:
        config = configs.replace(config, dropout_rate=settings.dropout)
    usual = native if max(native) <= 224 or native[0] != native[1] else (224, 224)
    return config, settings.img_size or usual, path


def build_model(settings: Settings, config, size, path, num_classes: int) -> tuple[VisionTransformer, dict]:
    """The model with a new head, and the file it comes from: {"name", "sha256"}, empty from scratch."""
    if path is None:
        torch.manual_seed(settings.seed)  # of the initial values
        return VisionTransformer(config, size, num_classes), {}
    model = exchange.load(path, img_size=size, num_classes=num_classes, config=config, in_chans=config.in_chans)
    weights = huggingface.weights_in(path) if path.is_dir() else path
    return model, {"name": path.name, "sha256": sha256(weights)}


def make_batches(settings: Settings, dataset: data.Data, model: VisionTransformer, device):
    """(training, selection, test): `best` is chosen on the second, which is the test where nothing is held out."""
    workers = settings.num_workers if settings.num_workers >= 0 else min(os.cpu_count() or 1, 8)
    look = dict(size=model.img_size, mean=model.config.mean, std=model.config.std, device=device, workers=workers)
    area = dataset.view.min_area if settings.min_area is None else settings.min_area
    view = data.View(min_area=area, flip=dataset.view.flip and not settings.no_flip)
    train = TrainBatches(resident(dataset.train, model.img_size, device), batch_size=settings.train_batch_size,
                         seed=settings.seed, training_view=view, **look)
    look |= dict(batch_size=settings.eval_batch_size)
    test = EvalBatches(resident(dataset.test, model.img_size, device), name="test", **look)
    if dataset.val is None:
        return train, test, test
    return train, EvalBatches(resident(dataset.val, model.img_size, device), name="val", **look), test


def train(settings: Settings, command: str = "") -> dict:
    """One run from its settings to its folder; returns {"folder", "last", "best"}, the last two as test `Metrics`."""
    device = choose_device(settings.device, settings.local_rank)
    precision = choose_precision(settings, device)
    if settings.name:
        check_free(Path(settings.output_dir) / settings.name, settings.overwrite)  # before anything takes its time
    config, size, path = choose_model(settings)
    dataset = data.load(settings.dataset, data_dir=settings.data_dir, val_fraction=settings.val_fraction,
                        seed=settings.seed, in_chans=config.in_chans)
    pixels = "x".join(str(n) for n in dict.fromkeys(size))
    folder = Path(settings.output_dir) / (settings.name or f"{dataset.name}-{config.name}-{pixels}")
    check_free(folder, settings.overwrite)
    model, origin = build_model(settings, config, size, path, len(dataset.train.classes))
    batches, selection, test = make_batches(settings, dataset, model, device)
    model.to(device).train()
    summarise(settings, dataset, model, origin, device, precision, folder)

    chosen = {"name": folder.name, "model_type": model.config.name, "img_size": model.img_size,
              "in_chans": model.config.in_chans, "device": str(device),
              "dropout": model.config.dropout_rate, "precision": str(precision).removeprefix("torch."),
              "pretrained_dir": origin.get("name", "none"), **asdict(batches.training_view)}
    settings_of_run = {**asdict(settings), "resolved": chosen}
    about = {"classes": dataset.train.classes, "finetuned_from": origin, "settings": settings_of_run}
    with Run(folder, settings_of_run, command) as run:
        last, best, found = fit(settings, model, batches, selection, precision, run, about)
        return finish(run, model, test, last, best, found)


def fit(settings: Settings, model, batches: TrainBatches, selection: EvalBatches, precision, run: Run, about: dict):
    """The loop: update, follow, and from time to time evaluate and save. Returns what is known of `last` and `best`."""
    optimizer = make_optimizer(model, settings.optimizer, weight_decay=settings.weight_decay,
                               momentum_dtype=torch.bfloat16 if settings.momentum_dtype == "bfloat16" else None)
    scaler = make_scaler(batches.device.type, precision, settings.loss_scale)
    progress = Progress(run, settings.num_steps, settings.train_batch_size, scaled=scaler.is_enabled())
    best = None
    for step, (images, labels) in enumerate(batches.stream(range(settings.num_steps)), start=1):
        lr = lr_at(step - 1, base=settings.learning_rate, total=settings.num_steps, warmup=settings.warmup_steps,
                   decay=settings.decay_type)
        with attention_kernel(model, batches.device, precision):
            result = train_step(model, optimizer, scaler, images, labels, lr=lr, precision=precision,
                                micro_batches=settings.gradient_accumulation_steps,
                                max_grad_norm=settings.max_grad_norm, dropout_seed=(settings.seed, step))
        progress.add(step, lr, result)
        if step % settings.eval_every == 0 or step == settings.num_steps:
            with progress.paused():
                found = evaluate(model, selection, precision if step < settings.num_steps else torch.float32)
                run.log(step, **{f"{selection.name}_accuracy": found.accuracy, f"{selection.name}_loss": found.loss})
                progress.say(f"{selection.name} accuracy {found.accuracy:.2%}, loss {found.loss:.4f}")
                last = {**about, "step": step, "accuracy": {selection.name: found.accuracy}}
                run.save("last", model, **last)
                if best is None or found.accuracy > best["accuracy"][selection.name]:
                    best = last
                    run.save("best", model, **best)
    progress.close()
    return last, best, found


def finish(run: Run, model: VisionTransformer, test: EvalBatches, last: dict, best: dict, found: Metrics) -> dict:
    """Scores `last` and `best` on the test set in float32, writes the scores into their headers and says them.

    found: the loop's last evaluation, in float32 already; it is not repeated where it was on the test set.
    """
    selects = next(iter(last["accuracy"]))  # "val", or "test" where nothing is held out
    scores = {"last": found if selects == "test" else evaluate(model, test)}
    for kind, about in (("last", last), ("best", best)):
        if kind == "best" and best["step"] == last["step"]:
            scores["best"] = scores["last"]
        elif kind == "best":
            model.load_state_dict(exchange.load(run.folder / "best.safetensors").state_dict())
            scores["best"] = evaluate(model, test)
        score = scores[kind]
        run.save(kind, model, **{**about, "accuracy": {**about["accuracy"], "test": score.accuracy}})
        name = "best_test" if kind == "best" else "test"
        if kind == "best" or selects == "val":  # else the loop has logged it
            run.log(about["step"], **{f"{name}_accuracy": score.accuracy, f"{name}_loss": score.loss})
    part = "the held-out part" if selects == "val" else "this same test set"
    why = {"last": "the end of the run", "best": f"the best of the evaluations on {part}"}
    for kind, about in (("last", last), ("best", best)):
        log.info("%s     %.2f %% of %s test images, loss %.4f (step %d: %s)", kind, 100 * scores[kind].accuracy,
                 f"{scores[kind].images:,}", scores[kind].loss, about["step"], why[kind])
    minutes, seconds = divmod(round(time.time() - run.started), 60)
    log.info("output   %s, after %d min %02d s", run.folder, minutes, seconds)
    return {"folder": run.folder, **scores}


def main(argv: list[str] | None = None) -> dict:
    """The command line. An error is one sentence and exit code 2; --debug shows its traceback."""
    argv = sys.argv[1:] if argv is None else argv
    logging.basicConfig(format="%(message)s", stream=sys.stdout, level=logging.INFO, force=True)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        settings = parse(argv)
        with logging_redirect_tqdm():
            return train(settings, shlex.join(["python", "train.py", *argv]))
    except KeyboardInterrupt:
        print("\nInterrupted. If the run had its first evaluation, its folder holds the weights of the last one.",
              file=sys.stderr)
        raise SystemExit(130) from None
    except (ValueError, OSError, FloatingPointError, RuntimeError) as error:
        full = isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
        if "--debug" in argv or (isinstance(error, RuntimeError) and not full):
            raise
        advice = "The memory is full. Try more --gradient_accumulation_steps, or a smaller --img_size."
        print(f"error: {advice if full else error}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    main()
