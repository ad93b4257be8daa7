import pytest
import torch

from utils.diagnosis import Diagnosis
from utils.progress import LATE, Progress
from utils.step import StepResult


class Recorder:
    writes = True

    def __init__(self):
        self.lines = []

    def log(self, step, **values):
        self.lines.append((step, values))


def result(loss=1.0, finite=1.0, scale=1.0):
    return StepResult(*(torch.tensor(v) for v in (loss, 0.5, 2.0, finite, scale, 0.3)))


def follow(results, scaled=False):
    run = Recorder()
    progress = Progress(run, len(results), 8, scaled)
    for step, one in enumerate(results, start=1):
        progress.add(step, 0.1 * step, one)
    progress.flush()
    return run, progress


def test_every_update_is_logged_once_with_its_own_numbers():
    run, _ = follow([result(loss=float(i)) for i in range(12)])
    assert [step for step, _ in run.lines] == list(range(1, 13))
    assert [values["train_loss"] for _, values in run.lines] == list(range(12))
    assert run.lines[3][1]["train_lr"] == pytest.approx(0.4)
    assert [step for step, values in run.lines if "train_images_per_second" in values] == [10]


def test_a_run_that_goes_on_logs_the_same_lines_wherever_it_was_flushed():
    """Only the speed has no value yet where its line falls on the first step."""
    whole, parts = Recorder(), Recorder()
    one = Progress(whole, 20, 8, scaled=True)
    other = Progress(parts, 20, 8, scaled=True)
    for step in range(1, 21):
        overflow = result(finite=0.0 if step % 6 == 0 else 1.0, scale=2.0**16)
        one.add(step, 0.1, overflow)
        other.add(step, 0.1, overflow)
        if step in (3, 9, 10, 14):
            other.flush()
            state, other = other.state_dict(), Progress(parts, 20, 8, scaled=True, start=step)
            other.load_state_dict(state)
    one.flush()
    other.flush()
    assert [(step, list(values)) for step, values in whole.lines] == [(s, list(v)) for s, v in parts.lines]
    assert one.skipped == other.skipped == 3
    assert other.start == 14 and other.done == 20


def test_the_speed_is_known_also_when_every_step_is_evaluated():
    run, lines = Recorder(), []
    progress = Progress(run, 3, 8, scaled=False)
    for step in range(1, 4):
        progress.add(step, 0.1, result())
        with progress.paused():
            lines.append(progress.rate)
    assert lines[0] != lines[0] and all(rate > 0 for rate in lines[1:])


def test_an_update_is_read_a_few_steps_late():
    run = Recorder()
    progress = Progress(run, 100, 8, scaled=False)
    for step in range(1, LATE + 1):
        progress.add(step, 0.1, result())
    assert run.lines == []
    progress.add(LATE + 1, 0.1, result())
    assert [step for step, _ in run.lines] == [1]


def test_a_loss_that_is_not_finite_stops_the_run_with_the_true_step():
    with pytest.raises(FloatingPointError, match=r"Update 3 .* the loss was not finite \(learning rate 0.3\)"):
        follow([result(), result(), result(float("nan"), 0.0), result(), result(), result(), result(), result()])
    with pytest.raises(FloatingPointError, match="Update 2 was not made: the gradient was not finite"):
        follow([result(), result(finite=0.0)])


def test_overflows_under_a_loss_scale_are_counted_and_the_run_goes_on(caplog):
    caplog.set_level("INFO")
    _, progress = follow([result(finite=0.0, scale=2.0**16), result(scale=2.0**15)], scaled=True)
    progress.close()
    assert "1 of 2 updates overflowed in float16" in caplog.text


def test_a_loss_scale_below_one_stops_the_run():
    with pytest.raises(FloatingPointError, match=r"Update 2 .* the loss scale fell to 0.5.*--precision bf16"):
        follow([result(finite=0.0, scale=1.0), result(finite=0.0, scale=0.5)], scaled=True)


def test_a_fixed_loss_scale_that_never_fits_stops_the_run():
    with pytest.raises(FloatingPointError, match="Update 25 was not made: it was the 25th in a row to overflow"):
        follow([result(finite=0.0, scale=128.0)] * 40, scaled=True)


def test_evaluations_do_not_count_as_training_time(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("utils.progress.time.perf_counter", lambda: now[0])
    run = Recorder()
    progress = Progress(run, 10, 8, scaled=False)
    for step in range(1, 11):
        now[0] += 1.0
        progress.add(step, 0.1, result())
        if step == 5:
            with progress.paused():
                now[0] += 100.0
    progress.flush()
    assert run.lines[-1][1]["train_images_per_second"] == pytest.approx(8.0)


@pytest.mark.parametrize("wait, said", [(0.6, True), (0.05, False)])
def test_a_stream_that_holds_the_device_up_is_said_once(wait, said, monkeypatch, caplog):
    clock = [0.0]
    monkeypatch.setattr("utils.progress.time.perf_counter", lambda: clock[0])

    def stream():
        while True:
            clock[0] += wait
            yield torch.zeros(1), torch.zeros(1)
    progress, batches = Progress(Recorder(), 200, 8, scaled=False, diagnosis=Diagnosis(10, 0, 200, 8)), stream()
    for step in range(1, 201):
        progress.next(batches)
        clock[0] += 0.4
        progress.add(step, 0.1, result(loss=1.0 / step))
        if step % 50 == 0:
            with progress.paused():
                clock[0] += 100  # an evaluation is no waiting
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(told) == said and all("% of the last 50 steps' time the device waited" in text for text in told)


@pytest.mark.parametrize("steps, share", [(1, None), (11, 0.75), (100, 0.2)])
def test_how_long_the_device_waited_is_said_at_the_end(steps, share, monkeypatch, caplog):
    """The first 20 steps fill the pipeline: they wait 3 seconds for each one of work, and count only where all do."""
    clock = [0.0]
    monkeypatch.setattr("utils.progress.time.perf_counter", lambda: clock[0])
    caplog.set_level("INFO")

    def stream():
        for step in range(steps):
            clock[0] += 3.0 if step < 21 else 0.25  # the first step of all has none before it, and is not timed
            yield torch.zeros(1), torch.zeros(1)
    progress, batches = Progress(Recorder(), steps, 8, scaled=False), stream()
    for step in range(1, steps + 1):
        progress.next(batches)
        clock[0] += 1.0
        progress.add(step, 0.1, result())
        if step in (5, 50):
            with progress.paused():
                clock[0] += 100
    progress.flush()
    progress.close()
    said = [record.getMessage() for record in caplog.records if record.getMessage().startswith("data ")]
    if share is None:
        assert progress.data_wait_share != progress.data_wait_share and not said
    else:
        assert progress.data_wait_share == pytest.approx(share)
        assert said == [f"data     the device waited for images for {100 * share:.1f} % of its time"]


def test_a_log_without_a_bar_gives_signs_of_life(monkeypatch, caplog):
    clock = [0.0]
    monkeypatch.setattr("utils.progress.time.perf_counter", lambda: clock[0])
    caplog.set_level("INFO")
    progress = Progress(Recorder(), 100, 8, scaled=False)
    for step in range(1, 31):
        clock[0] += 7
        progress.add(step, 0.1, result())
    assert [record.getMessage().split("  ")[0] for record in caplog.records] == [
        "step 5/100", "step 14/100", "step 23/100"]
