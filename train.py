"""Fine-tune a Vision Transformer: parse, open, build, loop. Every batch, crop and learning rate is a function of
(settings, data, step); nothing else is remembered. `python train.py --help` lists the flags."""

import logging
import os
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
from tqdm.contrib.logging import logging_redirect_tqdm

from models import configs, exchange, sources
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


def build_model(settings: Settings, num_classes: int) -> tuple[VisionTransformer, dict]:
    """The model to start from, and the file it comes from: {"name", "sha256"}, empty from scratch."""
    config = configs.get_config(settings.model_type) if settings.model_type else None
    if settings.pretrained_dir == "none":
        config = config or configs.get_config("ViT-B_16")
        torch.manual_seed(settings.seed)  # of the initial values
        model = VisionTransformer(config, settings.img_size or (32 if config.name == "ViT-demo" else 224), num_classes)
        origin = {}
    else:
        path = sources.fetch(settings.pretrained_dir or f"checkpoint/{settings.model_type or 'ViT-B_16'}.npz")
        model = exchange.load(path, img_size=settings.img_size, num_classes=num_classes, config=config)
        if settings.img_size is None and min(model.img_size) > 224:
            model = exchange.load(path, img_size=224, num_classes=num_classes, config=config)
        origin = {"name": path.name, "sha256": sha256(path)}
    if settings.dropout is not None:
        model.config = configs.replace(model.config, dropout_rate=settings.dropout)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = settings.dropout
    return model, origin


def make_batches(settings: Settings, dataset: data.Data, model: VisionTransformer, device):
    """(training, selection, test): `best` is chosen on the second, which is the test where nothing is held out."""
    workers = settings.num_workers if settings.num_workers >= 0 else min(os.cpu_count() or 1, 8)
    look = dict(size=model.img_size, mean=model.config.mean, std=model.config.std, device=device, workers=workers)
    area = dataset.view.min_area if settings.min_area is None else settings.min_area
    view = data.View(min_area=area, flip=dataset.view.flip and not settings.no_flip)
    train = TrainBatches(resident(dataset.train, device), batch_size=settings.train_batch_size, seed=settings.seed,
                         training_view=view, **look)
    look |= dict(batch_size=settings.eval_batch_size)
    test = EvalBatches(resident(dataset.test, device), name="test", **look)
    if dataset.val is None:
        return train, test, test
    return train, EvalBatches(resident(dataset.val, device), name="val", **look), test


def train(settings: Settings) -> dict:
    """One run from its settings to its folder; returns {"folder", "last", "best"}, the last two as test `Metrics`."""
    device = choose_device(settings.device, settings.local_rank)
    precision = choose_precision(settings, device)
    dataset = data.load(settings.dataset, data_dir=settings.data_dir, val_fraction=settings.val_fraction,
                        seed=settings.seed)
    model, origin = build_model(settings, len(dataset.train.classes))
    size = "x".join(str(n) for n in dict.fromkeys(model.img_size))
    settings = replace(settings, img_size=model.img_size, model_type=model.config.name,
                       name=settings.name or f"{dataset.name}-{model.config.name}-{size}")
    folder = Path(settings.output_dir) / settings.name
    check_free(folder, settings.overwrite)
    batches, selection, test = make_batches(settings, dataset, model, device)
    model.to(device).train()
    summarise(settings, dataset, model, origin, device, precision, folder)

    with Run(folder, asdict(settings)) as run:
        about = {"classes": dataset.train.classes, "finetuned_from": origin, "settings": asdict(settings)}
        with attention_kernel(model, device, precision):
            last, best, found = fit(settings, model, batches, selection, precision, run, about)
        return finish(run, model, test, last, best, found)


def fit(settings: Settings, model, batches: TrainBatches, selection: EvalBatches, precision, run: Run, about: dict):
    """The loop: update, follow, and from time to time evaluate and save. Returns what is known of `last` and `best`."""
    optimizer = make_optimizer(model, settings.optimizer, weight_decay=settings.weight_decay)
    scaler = make_scaler(batches.device.type, precision, settings.loss_scale)
    progress = Progress(run, settings.num_steps, settings.train_batch_size, scaled=scaler.is_enabled())
    best = None
    for step, (images, labels) in enumerate(batches.stream(0, settings.num_steps), start=1):
        lr = lr_at(step - 1, base=settings.learning_rate, total=settings.num_steps, warmup=settings.warmup_steps,
                   decay=settings.decay_type)
        result = train_step(model, optimizer, scaler, images, labels, lr=lr, precision=precision,
                            micro_batches=settings.gradient_accumulation_steps, max_grad_norm=settings.max_grad_norm,
                            dropout_seed=(settings.seed, step))
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
    why = {"last": "the end of the run",
           "best": f"best of the evaluations on {'the held-out part' if selects == 'val' else 'this same test set'}, "
                   f"{best['accuracy'][selects]:.2%}"}
    for kind, about in (("last", last), ("best", best)):
        log.info("%s     %.2f %% of %s test images, loss %.4f (step %d: %s)", kind, 100 * scores[kind].accuracy,
                 f"{scores[kind].images:,}", scores[kind].loss, about["step"], why[kind])
    minutes, seconds = divmod(round(time.time() - run.started), 60)
    log.info("output   %s, after %d min %02d s", run.folder, minutes, seconds)
    return {"folder": run.folder, **scores}


def main(argv: list[str] | None = None) -> dict:
    """The command line. An error is one sentence and exit code 2; --debug shows its traceback."""
    logging.basicConfig(format="%(message)s", stream=sys.stdout, level=logging.INFO, force=True)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    debug = False
    try:
        settings = parse(argv)
        debug = settings.debug
        with logging_redirect_tqdm():
            return train(settings)
    except torch.OutOfMemoryError as error:
        problem = f"The GPU's memory is full ({str(error).splitlines()[0]}) Try more --gradient_accumulation_steps."
    except (ValueError, OSError, FloatingPointError) as error:
        problem = str(error)
        if debug:
            raise
    print(f"error: {problem}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("\nInterrupted. What the last evaluation saved is in the run's folder.", file=sys.stderr)
        raise SystemExit(130) from None
