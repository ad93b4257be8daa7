"""What a run's evaluations become: the last and the best, and the numbers and predictions at its end."""

import logging
import math
import time
from functools import partial

import torch

from utils.batches import EvalBatches
from utils.distributed import World
from utils.evaluation import Metrics, Outputs, measure, shared_outputs
from utils.interrupt import EXIT, Interrupt, Interrupted
from utils.progress import Progress
from utils.resources import amount, peak_memory
from utils.runs import Run
from utils.state import State, replacing_text
from utils.tables import write_rows

log = logging.getLogger(__name__)


def remember(now: State, run: Run, part: str, found: Metrics, metric: str) -> None:
    """An evaluation becomes the last one, and the best one where it is."""
    shown = _shown(found, metric)
    run.log(now.step, **{f"{part}_{name}": value for name, value in shown.items()})
    now.last = {"step": now.step, "part": part, **found._asdict()}
    value = -shown["loss"] if metric == "loss" else shown[metric]
    value = -math.inf if math.isnan(value) else value
    if not now.best or value > now.best["value"]:
        now.best = {**now.last, "value": value, "since": 0}
        now.remember_best()
    else:
        now.best["since"] = now.best.get("since", 0) + 1  # evaluations without a better one


def _shown(found: Metrics, metric: str) -> dict[str, float]:
    """What of an evaluation makes curves."""
    shown = {"accuracy": found.accuracy, "loss": found.loss, metric: getattr(found, metric)}
    return {name: math.nan if value is None else value for name, value in shown.items()}


def remember_average(now: State, run: Run, part: str, found: Metrics, metric: str) -> None:
    """An evaluation of the averaged weights becomes their last one. It chooses nothing."""
    run.log(now.step, **{f"average_{part}_{name}": value for name, value in _shown(found, metric).items()})
    now.averaged = {"step": now.step, "part": part, **found._asdict()}


def evaluate(now: State, run: Run, progress: Progress, selection: EvalBatches, precision: torch.dtype, metric: str,
             epoch: float, world: World, interrupt: Interrupt) -> Outputs:
    """What the weights, and their average, say about the images on which `best` is chosen: remembered and said, beside
    what the training batches since the last evaluation said. epoch: passes over train so far, 0 where nobody counts
    them. Interrupted: a signal has come; nothing is remembered."""
    ask = partial(shared_outputs, batches=selection, precision=precision, scores=metric == "map", world=world,
                  stop=interrupt.check if world.size == 1 else None)
    said, classes = ask(now.model), len(selection.split.classes)
    found = measure(said, classes)
    average = measure(ask(now.average.model), classes) if now.average and now.average.ready else None
    remember(now, run, selection.name, found, metric)
    loss, accuracy = progress.means()
    words = f"epoch {epoch:.2f}  " if epoch else ""
    if loss == loss:
        words += f"train accuracy {100 * accuracy:.2f} %, loss {loss:.4f}  "
    words += f"{selection.name} {in_words(found)}"
    if average:
        remember_average(now, run, selection.name, average, metric)
        words += f"  averaged {in_words(average)}"
    progress.say(words)
    return said


def confirm(now: State, run: Run, selection: EvalBatches, metric: str, world: World,
            interrupt: Interrupt) -> Outputs:
    """The last evaluation again, in float32, as that of every end is: a run that stops early knows it only then. It
    replaces `last`, and chooses nothing."""
    said = shared_outputs(now.model, selection, torch.float32, scores=metric == "map", world=world,
                          stop=interrupt.check if world.size == 1 else None)
    found = measure(said, len(selection.split.classes))
    run.log(now.step, **{f"{selection.name}_{name}": value for name, value in _shown(found, metric).items()})
    now.last = {"step": now.step, "part": selection.name, **found._asdict()}
    return said


def over(now: State, patience: int) -> bool:
    """Whether so many evaluations in a row brought no new best; never for 0."""
    return bool(patience) and now.best.get("since", 0) >= patience


def in_words(found: Metrics, of: str = "") -> str:
    precision = "" if found.map is None else f"mean average precision {found.map:.4f}, "
    return f"{precision}{'' if of else 'accuracy '}{100 * found.accuracy:.2f} %{of}, loss {found.loss:.4f}"


def stop(now: State, run: Run, number) -> None:
    """Ends the process with the exit code that a shell gives for this signal."""
    log.info("%s: stopped after step %d, which is saved. To continue: python train.py --resume %s", number.name,
             now.step, run.folder)
    raise SystemExit(EXIT[number])


def score(now: State, run: Run, selection: EvalBatches, test: EvalBatches, said: Outputs | None, world: World,
          interrupt: Interrupt) -> None:
    """The last, best and averaged weights on the test set, in float32; those that one would take leave predictions.csv.
    said: the loop's last evaluation. Interrupted: a signal has come; nothing was logged."""
    ask = partial(shared_outputs, batches=test, scores=now.last["map"] is not None, world=world,
                  stop=interrupt.check if world.size == 1 else None)
    chosen_on_test = selection is test
    last = best = said if chosen_on_test and said else ask(now.model)
    if now.best["step"] != now.step:
        with now.best_in_place():
            best = ask(now.model)
    weights = {"last": last, "best": best} | (
        {"averaged": ask(now.average.model)} if now.average and now.average.ready else {})
    scores = {kind: measure(found, len(test.split.classes)) for kind, found in weights.items()}
    if not chosen_on_test:
        for kind, prefix in (("last", ""), ("averaged", "average_")):
            if kind in scores:
                run.log(now.step, **{f"{prefix}test_accuracy": scores[kind].accuracy,
                                     f"{prefix}test_loss": scores[kind].loss})
    run.log(now.best["step"], best_test_accuracy=scores["best"].accuracy, best_test_loss=scores["best"].loss)
    if run.writes:
        with replacing_text(run.folder / "predictions.csv") as file:
            write_rows(file, test.split, last if chosen_on_test else best)
    now.finished = {kind: found._asdict() for kind, found in scores.items()}


def finish(now: State, run: Run, progress: Progress, selection: EvalBatches, test: EvalBatches, said: Outputs | None,
           world: World, interrupt: Interrupt) -> dict:
    """Scores `last`, `best` and the average on the test set in float32, writes and says the scores."""
    if now.finished:
        early = over(now, run.about["settings"].get("early_stopping", 0))
        log.info("finished already: more --num_steps%s would go on", " or --early_stopping" * early)
    else:
        try:
            score(now, run, selection, test, said, world, interrupt)
        except Interrupted:
            stop(now, run, interrupt.signal)
        run.save(now, progress)
    scores = {kind: Metrics(**found) for kind, found in now.finished.items()}
    part = "this same test set" if selection is test else "the held-out part"
    why = {"last": "the end of the run", "best": f"the best of the evaluations on {part}",
           "averaged": f"the mean of {now.average.count} steps' weights" if now.average else ""}
    for kind, found in (("last", now.last), ("best", now.best), ("averaged", now.averaged)):
        if found and kind in scores:
            log.info("%-8s %s (step %d: %s)", kind, in_words(scores[kind], f" of {scores[kind].images:,} test images"),
                     found["step"], why[kind])
    if now.average and not now.average.ready:
        log.warning("The run ended before the weights were to be averaged.")
    minutes, seconds = divmod(round(time.monotonic() - run.started), 60)
    peak = peak_memory(now.model.pos_embed.device)
    log.info("output   %s, after %d min %02d s%s", run.folder, minutes, seconds,
             f", peak memory {amount(peak)}" if peak else "")
    return {"folder": run.folder, **scores}
