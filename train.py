"""Fine-tune a Vision Transformer: parse, open, build, loop. Every batch, crop and learning rate is a function of
(settings, data, step); nothing else is remembered. `python train.py --help` lists the flags."""

import logging
import os
import shlex
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
from tqdm.contrib.logging import logging_redirect_tqdm

from utils import curves, data, distributed, opening, preflight, probe, report, summary
from utils.averaging import make_average
from utils.batches import EvalBatches, TrainBatches
from utils.commands import start_log
from utils.device import Computing, choose_compile, choose_device, choose_precision, compile_blocks, make_deterministic
from utils.diagnosis import diagnose
from utils.distributed import ALONE, World
from utils.evaluation import Outputs
from utils.feeds import make_batches
from utils.fitting import begin
from utils.interrupt import EXIT, Interrupt, Interrupted
from utils.losses import make_criterion
from utils.opening import best_by, open_run
from utils.optim import lr_at, make_optimizer
from utils.pictures import shown
from utils.progress import Progress
from utils.resources import out_of_memory
from utils.runs import Run, full
from utils.scoring import confirm, evaluate, finish, over, stop
from utils.settings import Settings, given
from utils.state import State
from utils.step import make_scaler, rehearse, train_step

log = logging.getLogger("train")

SHOWN = 25  # images of the first batch, in TensorBoard


def train(flags: dict, command: str = "", world: World = ALONE) -> dict:
    """One run, new or continued, from the flags given by hand to its folder; returns {"folder", "last", "best"}, with
    "averaged" where that was asked for, all but the first as test `Metrics`; {} where nothing was trained."""
    if flags.get("summary"):
        log.info("%s", summary.describe(opening.bare_model(flags)))
        return {}
    opened = open_run(flags)
    settings = opened.computing()
    device = choose_device(settings.device, world.local_rank if world.size > 1 else settings.local_rank)
    precision = choose_precision(settings, device)
    computing = Computing(device, precision, world.size)
    if settings.deterministic:
        make_deterministic()
    with world.first():  # which may download the data
        dataset = data.load(**opened.where, seed=settings.seed, val_fraction=settings.val_fraction,
                            in_chans=opened.config.in_chans)
    dataset = preflight.check_data(dataset, settings, opened.size)
    opened = opened.in_steps(len(dataset.train))
    settings = opened.computing()
    opened.check_same(dataset, computing)
    model, origin = opened.build_model(len(dataset.train.classes))
    if settings.few_shot and not settings.dry_run:
        log.info("%s", probe.said(model.to(device), dataset, settings, bool(origin), world.size))
        return {}
    model.gradient_checkpointing = settings.gradient_checkpointing
    images = settings.num_steps * settings.train_batch_size // world.size
    compiled, = world.any(choose_compile(settings.compile, model, device, images))  # each measures its own GPU
    computing = computing._replace(compiled=compiled)
    fitting = begin(settings, opened.split, model, precision, device, world)
    preflight.summarise(settings, dataset, model, origin, computing, opened.folder, fitting, opened.step)
    preflight.check_room(settings, model, opened.folder)
    if settings.dry_run:
        preflight.dry_run(settings, dataset, model, computing, opened.folder, fitting)
        return {}
    batches, selection, test = make_batches(settings, dataset, model, device, world)
    optimizer = make_optimizer(model.to(device).train(), settings.optimizer, weight_decay=settings.weight_decay,
                               momentum_dtype=torch.bfloat16 if settings.momentum_dtype == "bfloat16" else None)
    criterion = make_criterion(dataset.train, settings.label_smoothing, settings.class_weights)
    now = State(model, optimizer, make_scaler(device.type, precision, settings.loss_scale), fitting,
                average=make_average(model, settings))
    opened.restore(now)  # before anything is written
    labels = dataset.train.labels[:1].expand(batches.count(0), *dataset.train.labels.shape[1:]).to(device)
    fitting.settle(partial(rehearse, model, optimizer, now.scaler, labels, precision, criterion, world), len(labels),
                   device, world)  # before compiling, which would take a while for each split
    if compiled:
        compile_blocks(model)
    about = opened.about(dataset, model, origin, batches.training_view, computing, fitting.parts)
    with Run(opened.folder, about, opened.command or command, metrics=opened.metrics, step=opened.step,
             writes=world.rank == 0) as run:
        progress = Progress(run, settings.num_steps, settings.train_batch_size, scaled=now.scaler.is_enabled(),
                            start=opened.step, diagnosis=diagnose(settings, dataset.train, batches.workers))
        opened.resume(run, now, progress)
        with Interrupt() as interrupt:
            said = fit(settings, now, run, progress, batches, selection, precision, criterion, world, interrupt)
            found = finish(now, run, progress, selection, test, said, world, interrupt)
    if run.writes and not settings.no_report:
        add_report(run.folder)
    return found


def fit(settings: Settings, now: State, run: Run, progress: Progress, batches: TrainBatches, selection: EvalBatches,
        precision: torch.dtype, criterion, world: World, interrupt: Interrupt) -> Outputs | None:
    """The loop: evaluate, save, stop, update, in this order, so that a run that goes on from `now` takes the same turns
    as one that never stopped. There is one turn more than there are updates. Returns the last evaluation, in float32;
    None where the run was continued behind it."""
    said, metric = None, best_by(settings, selection.split)
    example = torch.zeros(1, now.model.config.in_chans, *now.model.img_size, device=batches.device)
    network = world.parallel(now.model, example)
    stream = batches.stream(range(now.step, settings.num_steps))
    size = len(batches.split)  # of an epoch
    while True:
        at_end = now.step == settings.num_steps or over(now, settings.early_stopping)
        due = now.step and (at_end or settings.evaluates(now.step, size)) and now.last.get("step") != now.step
        if due:
            with progress.paused(), suppress(Interrupted):
                epoch = now.step * settings.train_batch_size / size if settings.num_epochs else 0
                said = evaluate(now, run, progress, selection, torch.float32 if at_end else precision, metric, epoch,
                                world, interrupt)
                if not at_end and over(now, settings.early_stopping):
                    at_end = True
                    if precision != torch.float32:
                        said = confirm(now, run, selection, metric, world, interrupt)
                    log.info("Stopped early: %d evaluations in a row brought no new best.", settings.early_stopping)
        asked = [interrupt.signal == number for number in EXIT]
        *asked, save, cut = world.any(*asked, run.save_is_due(now.step, settings.save_every), now.fitting.changed)
        if cut:
            now.fitting.agree(world)
        if due or save or any(asked):
            with progress.paused():
                run.save(now, progress)
        if any(asked):
            world.gather(None)  # when one has ended torchrun ends the others, of whom the first may still be saving
            progress.close()
            stop(now, run, list(EXIT)[asked.index(True)])
        if at_end:
            break
        images, labels = progress.next(stream)
        if run.writes and not now.step:
            run.show("train/images", shown(images[:SHOWN], now.model.config), step=0)
        lr = lr_at(now.step, base=settings.learning_rate, total=settings.num_steps, warmup=settings.warmup_steps,
                   decay=settings.decay_type)
        now.step += 1
        result = train_step(network, now.optimizer, now.scaler, images, labels, lr=lr, precision=precision,
                            micro_batches=now.fitting, criterion=criterion,
                            max_grad_norm=settings.max_grad_norm, world=world,
                            dropout_seed=(settings.seed, now.step, world.rank))
        if now.average:
            now.average.update(now.model, now.step)
        progress.add(now.step, lr, result)
    progress.close()
    return said


def add_report(folder: Path) -> None:
    """curves.png, curves.csv and report.html; whatever goes wrong there, the run is finished and whole."""
    for what, write in (("curves", lambda: curves.write(folder)[1]), ("report", lambda: report.write([folder]))):
        try:
            log.info("%-8s %s", what, write())
        except KeyboardInterrupt:
            log.warning("No %s: interrupted. It can be made later: python -m utils.report %s", what, folder)
        except Exception as error:
            log.warning("No %s: %s. It can be made later: python -m utils.report %s", what, error, folder)


def as_sentence(error: Exception) -> str | None:
    """What a person is told; None: a fault of the program, whose traceback belongs on the screen."""
    if out_of_memory(error):
        return "The memory is full. Try --gradient_accumulation_steps auto, or smaller --eval_batch_size or --img_size."
    if isinstance(error, OSError) and (sentence := full(error)):
        return sentence
    if isinstance(error, RuntimeError) and distributed.lost(error):
        return ("Another process of this run is gone, and this one ends, too; what that one said tells why. The last "
                f"state that was saved is whole: --resume continues from it. ({str(error).splitlines()[0]})")
    return None if isinstance(error, RuntimeError) else str(error)


def main(argv: list[str] | None = None) -> dict:
    """The command line. An error is one sentence and exit code 2; --debug shows its traceback."""
    argv = sys.argv[1:] if argv is None else argv
    rank = int(os.environ.get("RANK", 0))
    start_log(sys.stdout, logging.ERROR if rank else logging.INFO)
    try:
        flags = given(argv)
        use_cuda = torch.cuda.is_available() and flags.get("device") != "cpu"
        with logging_redirect_tqdm(), distributed.processes(use_cuda) as world:
            return train(flags, shlex.join([*distributed.launcher(), "train.py", *argv]), world)
    except KeyboardInterrupt:
        print("\nInterrupted while nothing was being trained; what had been saved is as it was.", file=sys.stderr)
        raise SystemExit(130) from None
    except (ValueError, OSError, FloatingPointError, RuntimeError, MemoryError) as error:
        sentence = as_sentence(error)
        if "--debug" in argv or not sentence:
            raise
        sys.stderr.write(f"[process {rank}] " * bool(rank) + f"error: {sentence}\n")  # at once: others write, too
    raise SystemExit(2)


if __name__ == "__main__":
    main()
