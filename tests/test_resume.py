"""Runs that are interrupted and continued, through `main(argv)`; what must not change does not, to the bit."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train
from bench.kill import differences, stripped
from models import exchange
from tests.test_state import room_for
from utils import evaluation, scoring

STEPS = 14


class Crash(Exception):
    """A fault that nothing catches."""


@pytest.fixture
def start(small_run):
    """start("--flag", value ...) -> main's result for a run with dropout, crops and two micro-batches."""
    return partial(small_run, "--num_steps", STEPS, "--learning_rate", 0.1, "--dropout", 0.1,
                   "--gradient_accumulation_steps", 2)


@pytest.fixture
def cut(start, monkeypatch, tmp_path):
    """cut(step, "--flag" ...) starts a run, stops it in that update, by a signal or (None) by a fault that saves
    nothing, and returns its folder."""
    def run(step, *argv, name="run", number=signal.SIGTERM):
        real = train.train_step

        def update(*args, **kwargs):
            if kwargs["dropout_seed"][1] == step:
                if number is None:
                    raise Crash
                os.kill(os.getpid(), number)
            return real(*args, **kwargs)
        with monkeypatch.context() as patch:
            patch.setattr(train, "train_step", update)
            with pytest.raises((SystemExit, Crash)) as stop:
                start(*argv, name=name)
        assert number is None or stop.value.code == {signal.SIGTERM: 143, signal.SIGINT: 130}[number]
        return tmp_path / "output" / name
    return run


def resume(folder, *argv):
    return train.main(["--resume", str(folder), *map(str, argv)])


def error_of(capsys, *argv):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        train.main([str(word) for word in argv])
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


def lines_of(folder):
    return [stripped(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("step", [1, 4, 7, STEPS])
def test_a_run_that_was_stopped_by_a_signal_continues_to_the_same_bits(step, number, start, cut, capsys):
    whole = start(name="whole")
    folder = cut(step, number=number)
    out = capsys.readouterr().out
    assert f"{number.name}: stopped after step {step}, which is saved" in out and f"--resume {folder}" in out
    result = resume(folder)
    assert differences(whole["folder"], folder) == []
    assert result["last"] == whole["last"] and result["best"] == whole["best"]
    for kind in ("last", "best"):
        one, other = (load_file(run / f"{kind}.safetensors") for run in (whole["folder"], folder))
        assert all(torch.equal(value, other[name]) for name, value in one.items())
        about = exchange.read_metadata(folder / f"{kind}.safetensors")
        assert about["accuracy"] == exchange.read_metadata(whole["folder"] / f"{kind}.safetensors")["accuracy"]


@pytest.mark.parametrize("flags", [["--optimizer", "adamw", "--learning_rate", 0.003], ["--momentum_dtype", "bfloat16"],
                                   ["--val_fraction", 0.25, "--metric", "loss"], ["--precision", "bf16"],
                                   ["--save_every", 3, "--eval_every", 1], ["--class_weights", "balanced"],
                                   ["--pad_crop", 2, "--randaugment", 2, "--mixup", 0.8, "--cutmix", 1],
                                   ["--train", "lora:2"], ["--train", "last:1", "--optimizer", "adamw"],
                                   ["--ema", 0.9, "--drop_path", 0.5], ["--swa", 0.7, "--decay_type", "constant"],
                                   ["--swa", 0.3], ["--train", "lora:2", "--ema", 0.9]])
def test_every_kind_of_run_continues_to_the_same_bits(flags, start, cut):
    if "bf16" in flags:
        flags = [*flags, "--gradient_accumulation_steps", 1]
    whole, folder = start(*flags, name="whole"), cut(6, *flags)
    resume(folder)
    assert differences(whole["folder"], folder) == []


def test_a_run_can_be_stopped_many_times(start, cut, monkeypatch):
    whole, folder = start(name="whole"), cut(2)
    for step in (3, 4, 5, 9, 13):
        cut(step, "--resume", "auto")
    resume(folder)
    assert differences(whole["folder"], folder) == []


def test_a_signal_during_an_evaluation_leaves_it_to_the_run_that_continues(start, monkeypatch, tmp_path):
    whole, real = start("--eval_batch_size", 2, name="whole"), evaluation.outputs

    def interrupted(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **kwargs)
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "outputs", interrupted)
        with pytest.raises(SystemExit):
            start("--eval_batch_size", 2)
    folder = tmp_path / "output" / "run"
    assert {step for step, *_ in lines_of(folder)} == {1, 2, 3, 4} and not (folder / "last.safetensors").exists()
    assert not any(name.startswith("test/") for _, name, _ in lines_of(folder))
    resume(folder)
    assert differences(whole["folder"], folder) == []


def test_the_state_alone_is_enough(start, cut):
    """In another place, without the checkpoint, settings and weights files; only the lines before are gone."""
    whole, folder = start(name="whole"), cut(9)
    moved = folder.with_name("moved")
    moved.mkdir()
    shutil.copy(folder / "state.pt", moved)
    (folder.parent.parent / "tiny.npz").unlink()
    result = resume(moved)
    assert result["folder"] == moved and result["last"] == whole["last"]
    assert set(differences(whole["folder"], moved)) == {f"metrics.jsonl ({len(lines_of(whole['folder']))} and "
                                                        f"{len(lines_of(moved))} lines)"}
    assert lines_of(moved) == [line for line in lines_of(whole["folder"]) if line[0] > 9 or line[1].startswith("best/")]
    assert json.loads((moved / "settings.json").read_text())["learning_rate"] == 0.1


@pytest.mark.parametrize("change", ["missing", "damaged", "other weights", "later"])
def test_weights_files_that_disagree_with_the_state_are_written_again(change, start, cut, capsys):
    folder = cut(9, number=None)  # its state is of step 8, right after an evaluation
    right = {name: value.clone() for name, value in load_file(folder / "last.safetensors").items()}  # it maps the file
    path = folder / "last.safetensors"
    if change == "missing":
        path.unlink()
    elif change == "damaged":
        path.write_bytes(path.read_bytes()[:-100])
    else:
        model, about = exchange.load(path), exchange.read_metadata(path)
        with torch.no_grad():
            model.head.bias += change == "other weights"
        exchange.save(model, path, {**about, "step": about["step"] + 4 * (change == "later")})
    capsys.readouterr()
    cut(9, "--resume", "auto", number=None)
    out = capsys.readouterr().out
    assert "last.safetensors is written again, from the state" in out and "best.safetensors is written" not in out
    again = load_file(path)
    assert all(torch.equal(value, again[name]) for name, value in right.items())
    assert exchange.read_metadata(path)["step"] == 8


def test_a_newer_weights_file_is_replaced_when_the_state_fell_back(start, cut, capsys):
    whole, folder = start(name="whole"), cut(10, "--save_every", 3)
    (folder / "state.pt").write_bytes(b"x")  # step 10; the one before is of step 9, its last evaluation of step 8
    shutil.copy(whole["folder"] / "last.safetensors", folder)
    cut(11, "--resume", "auto", name="run")
    assert "continuing from the state before, state.previous.pt of step 9" in capsys.readouterr().out
    about = exchange.read_metadata(folder / "last.safetensors")
    assert about["step"] == 9 and about["accuracy"] == {}  # as it is known, and nothing said that is not
    resume(folder)
    assert differences(whole["folder"], folder) == []


def test_both_generations_damaged_is_one_sentence(cut, capsys):
    folder = cut(10, "--save_every", 3)
    for name in ("state.pt", "state.previous.pt"):
        (folder / name).write_bytes(b"x")
    assert "no state to continue from: state.pt is damaged" in error_of(capsys, "--resume", folder)


def test_lines_after_the_state_are_logged_once_and_lost_ones_are_said(start, cut, capsys):
    whole, folder = start(name="whole"), cut(6)
    metrics = folder / "metrics.jsonl"
    data = metrics.read_bytes()
    metrics.write_bytes(data + b'{"step": 7, "name": "train/loss", "value": 1.0, "time": 1}\n{"step": 7, "na')
    resume(folder)
    assert lines_of(folder) == lines_of(whole["folder"])
    folder = cut(6, name="short")
    (folder / "metrics.jsonl").write_bytes(data[:-50])
    resume(folder)
    assert "has lost its end" in capsys.readouterr().out
    assert lines_of(folder)[:5] == lines_of(whole["folder"])[:5]
    assert len(lines_of(folder)) == len(lines_of(whole["folder"])) - 1


def test_a_finished_run_says_its_result_again_and_changes_nothing(start, capsys):
    first = start()
    before = {path: path.read_bytes() for path in first["folder"].rglob("*") if path.is_file()}
    capsys.readouterr()
    again = resume(first["folder"])
    assert again == first
    assert f"last     {100 * first['last'].accuracy:.2f} % of 12 test images" in capsys.readouterr().out
    for name in ("metrics.jsonl", "state.pt", "last.safetensors", "best.safetensors"):
        assert (first["folder"] / name).read_bytes() == before[first["folder"] / name]


def test_auto_starts_where_nothing_is_and_continues_where_something_is(start, cut):
    whole = start("--resume", "auto", name="whole")
    cut(5, "--resume", "auto")
    result = start("--resume", "auto")
    assert differences(whole["folder"], result["folder"]) == []


def test_auto_starts_a_run_again_that_was_cut_off_before_its_first_state(start, tmp_path, capsys):
    folder = tmp_path / "output" / "run"
    folder.mkdir(parents=True)
    (folder / "settings.json").write_text('{"resolved": {}}')
    (folder / "metrics.jsonl").write_text('{"step": 1, "na')
    assert "has no state.pt" in error_of(capsys, "--resume", folder)
    start("--resume", "auto")
    assert lines_of(folder)[0][0] == 1


def test_auto_leaves_an_old_run_without_a_state_alone(start, capsys, tmp_path):
    folder = start()["folder"]
    for name in ("state.pt", "state.previous.pt"):
        (folder / name).unlink()
    before = (folder / "metrics.jsonl").read_bytes()
    with pytest.raises(SystemExit):
        start("--resume", "auto")
    assert "holds a run already" in capsys.readouterr().err and (folder / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("flags, words", [
    (["--learning_rate", 0.2, "--seed", 7], "--learning_rate 0.1 -> 0.2, --seed 42 -> 7. Leave them out"),
    (["--train_batch_size", 6], "--train_batch_size 12 -> 6"),
    (["--momentum_dtype", "bfloat16"], "--momentum_dtype float32 -> bfloat16"),
    (["--num_steps", STEPS - 1], f"--num_steps {STEPS} -> {STEPS - 1}"), (["--dropout", 0.2], "--dropout 0.1 -> 0.2"),
    (["--val_fraction", 0.2], "--val_fraction 0.0 -> 0.2"), (["--bf16"], "--bf16 False -> True"),
    (["--overwrite"], "Choose one"), (["--name", "other"], "name two runs"), (["--metric", "loss"], "auto -> loss"),
    (["--pretrained_dir", "other.npz"], "tiny.npz -> other.npz"),
    (["--model_type", "ViT-B_16"], "--model_type auto -> ViT-B_16"),
    (["--gradient_accumulation_steps", 5], "cannot be split")])
def test_a_changed_setting_is_listed_and_refused(flags, words, cut, capsys):
    folder = cut(3)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert words in error_of(capsys, "--resume", folder, *flags)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_what_is_free_may_change_and_what_is_given_again_need_not(start, cut, image_folder, tmp_path):
    whole, folder = start(name="whole"), cut(5)
    shutil.move(image_folder, tmp_path / "elsewhere")
    resume(folder, "--eval_every", 5, "--eval_batch_size", 3, "--num_workers", 1, "--dataset", tmp_path / "elsewhere",
           "--learning_rate", 0.1, "--img_size", 16, "--model_type", "custom", "--save_every", 2, "--name", "run",
           "--metric", "accuracy", "--pretrained_dir", "elsewhere/tiny.npz", "--output_dir", f"{folder.parent}/")
    rest = set(differences(whole["folder"], folder))
    assert rest <= {"last", "best", "best_weights", "finished", "predictions.csv"} | {
        d for d in rest if d.startswith("metrics.jsonl")}
    assert [step for step, name, _ in lines_of(folder) if name == "test/accuracy"] == [4, 5, 10, STEPS]


def test_another_batch_split_is_equal_up_to_rounding_and_said(start, cut, capsys):
    plain = ("--dropout", 0)
    whole, folder = start(*plain, name="whole"), cut(5, *plain)
    resume(folder, "--gradient_accumulation_steps", 4)
    assert "--gradient_accumulation_steps 2 -> 4: equal up to rounding" in capsys.readouterr().out
    one, other = (dict(((s, n), v) for s, n, v in lines_of(f) if n == "train/loss") for f in (whole["folder"], folder))
    assert one == pytest.approx(other, rel=1e-4) and one != other
    kept = json.loads((folder / "settings.json").read_text())
    assert kept["gradient_accumulation_steps"] == 4
    (again,) = kept["continued"]
    assert again == {"step": 5, "gradient_accumulation_steps": 4, "time": pytest.approx(time.time(), abs=60)}


@pytest.mark.parametrize("step", [7, STEPS])
def test_more_steps_plan_the_learning_rate_anew_from_here(step, start, cut, capsys):
    longer, folder = start("--num_steps", 2 * STEPS, name="longer"), cut(step)
    if step == STEPS:
        resume(folder)
    resume(folder, "--num_steps", 2 * STEPS)
    out = capsys.readouterr().out
    assert f"--num_steps {STEPS} -> {2 * STEPS}: the learning rate is planned anew" in out
    rates = [{s: v for s, n, v in lines_of(f) if n == "train/lr"} for f in (longer["folder"], folder)]
    assert list(rates[1]) == list(range(1, 2 * STEPS + 1))
    assert {s: v for s, v in rates[0].items() if s > step} == {s: v for s, v in rates[1].items() if s > step}
    assert rates[0][step] != rates[1][step]
    assert (step, "run/num_steps", 2 * STEPS) in lines_of(folder)


@pytest.mark.parametrize("change, words", [
    ("added", "images were added, removed"), ("relabelled", "images were added, removed, renamed, relabelled"),
    ("a class", "3 classes then, 2 now"), ("renamed class", "other classes")])
def test_other_data_is_refused(change, words, cut, image_folder, capsys):
    folder = cut(3)
    train_part = image_folder / "train"
    if change == "added":
        shutil.copy(train_part / "red" / "0.png", train_part / "red" / "new.png")
    elif change == "relabelled":
        shutil.move(train_part / "red" / "0.png", train_part / "blue" / "r.png")
    for part in (train_part, image_folder / "test"):
        if change == "a class":
            shutil.rmtree(part / "red")
        elif change == "renamed class":
            (part / "red").rename(part / "rot")
    assert words in error_of(capsys, "--resume", folder)


def test_two_processes_never_write_to_one_run(cut, capsys):
    folder = cut(3)
    code = ("import fcntl, sys, time; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); print('locked', "
            "flush=True); time.sleep(60)")
    other = subprocess.Popen([sys.executable, "-c", code, str(folder / "metrics.jsonl")], stdout=subprocess.PIPE)
    try:
        assert other.stdout.readline() == b"locked\n"
        assert "Another process is writing to" in error_of(capsys, "--resume", folder)
    finally:
        other.kill()
        other.communicate()
    assert resume(folder)["last"].images == 12  # its lock has ended with it


def test_a_disk_that_fills_leaves_the_last_state_and_a_clear_message(start, cut, capsys, tmp_path):
    """Room for the metrics, not for a state; then room again."""
    whole, folder = start(name="whole"), cut(5)
    size = (folder / "state.pt").stat().st_size
    before = {name: (folder / name).read_bytes() for name in ("state.pt", "last.safetensors")}
    for limit in (size // 100, size // 2, size - 1):
        with room_for(limit):
            message = error_of(capsys, "--resume", folder)
        assert "There is no room for the run's files any more" in message and "--resume" in message
        assert {name: (folder / name).read_bytes() for name in before} == before
        assert not list(folder.glob("*.part"))
    resume(folder)
    assert differences(whole["folder"], folder) == []


def test_signals_before_and_after_the_loop_do_what_they_always_do(start, monkeypatch, capsys):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt
    monkeypatch.setattr(train, "finish", interrupt)
    with pytest.raises(SystemExit) as stop:
        start()
    assert stop.value.code == 130 and "what had been saved is as it was" in capsys.readouterr().err


def test_predictions_of_a_run_that_goes_on_are_not_left_to_be_taken_for_the_new_weights(start, capsys):
    folder = start()["folder"]
    before = (folder / "predictions.csv").read_bytes()
    resume(folder)                                        # finished: nothing happens
    assert (folder / "predictions.csv").read_bytes() == before
    resume(folder, "--num_steps", STEPS + 8, "--eval_every", STEPS + 2)
    after = (folder / "predictions.csv").read_bytes()
    assert after != before

    def crash(*args, **kwargs):
        raise Crash
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Crash):
        patch.setattr(train, "train_step", crash)
        resume(folder, "--num_steps", STEPS + 16)
    assert not (folder / "predictions.csv").exists()


def test_a_run_records_what_it_was_continued_from(cut):
    folder = cut(3)
    result = resume(folder)
    about = exchange.read_metadata(result["folder"] / "last.safetensors")
    assert [c["step"] for c in about["settings"]["continued"]] == [3] and len(about["fingerprint"]) == 64
    assert about["finetuned_from"]["name"] == "tiny.npz" and "--pretrained_dir" in about["command"]
    assert Path(json.loads((folder / "settings.json").read_text())["resume"]) == folder


def test_another_number_of_threads_is_said(cut, capsys):
    folder = cut(3)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        resume(folder)
    finally:
        torch.set_num_threads(before)
    out = capsys.readouterr().out
    assert "equal to an unbroken one up to rounding only" in out and f"threads {before} then, 3 now" in out


def test_a_deterministic_run_asks_pytorch_for_it(start, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", asked.append)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    start("--deterministic", "--num_steps", 1)
    assert asked == [True]


def test_a_run_s_folder_is_a_checkpoint_for_the_other_tools(start, tmp_path, capsys):
    import convert
    folder = start()["folder"]
    convert.main([str(folder), str(tmp_path / "out.npz")])
    weights = exchange.load(tmp_path / "out.npz").state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in load_file(folder / "last.safetensors").items())
    again = start("--pretrained_dir", folder, "--num_steps", 1, name="again")
    assert exchange.read_metadata(again["folder"] / "last.safetensors")["finetuned_from"]["name"] == "last.safetensors"


def test_what_is_not_there_is_said_before_weights_are_looked_for(start, capsys, tmp_path):
    for flags, words in ((["--dataset", "nowhere"], "neither a named set"), (["--labels", "no.csv"], "does not exist")):
        with pytest.raises(SystemExit):
            start(*flags, "--pretrained_dir", "ViT-B_16.npz")
        captured = capsys.readouterr()
        assert words in captured.err and "Fetching" not in captured.out


def test_a_device_that_computes_in_another_type_is_refused(cut, capsys, monkeypatch):
    folder = cut(3, "--precision", "bf16")
    monkeypatch.setattr("utils.opening.SHORT", {"bfloat16": "fp32"})  # as if this one had no bfloat16 at all
    assert "computes in bfloat16, and this device in float32: continue it where it began" in error_of(
        capsys, "--resume", folder)


@pytest.mark.parametrize("flags", [["--precision", "auto"], ["--precision", "auto", "--bf16"],
                                   ["--precision", "auto", "--fp16"], ["--precision", "bf16"]])
def test_the_same_command_can_be_launched_again_and_again(flags, start, cut):
    """As a scheduler does: the settings that are stored stay those that were given."""
    one = ["--gradient_accumulation_steps", 1]
    whole = start(*flags, *one, name="whole")
    for step in (3, 6, 10):
        folder = cut(step, "--resume", "auto", *flags, *one)
        kept = json.loads((folder / "settings.json").read_text())
        assert kept["precision"] == flags[1] and kept["bf16"] == ("--bf16" in flags)
    assert differences(whole["folder"], start("--resume", "auto", *flags, *one)["folder"]) == []


def test_the_resolved_words_are_the_flags_words(start, cut):
    folder = cut(3, "--precision", "auto", "--device", "auto")
    resolved = json.loads((folder / "settings.json").read_text())["resolved"]["precision"]
    assert resume(folder, "--precision", {"bfloat16": "bf16", "float32": "fp32"}[resolved])["last"].images == 12


def test_a_run_goes_on_from_any_folder(start, cut, image_folder, tmp_path, monkeypatch, capsys):
    """Its paths were relative to another one; they are in its own files, and not in the header of its weights."""
    monkeypatch.chdir(tmp_path)
    folder = cut(5, "--dataset", "images", "--pretrained_dir", "tiny.npz")
    monkeypatch.chdir("/")
    resume(folder)
    import evaluate
    evaluate.main([str(folder)])
    assert "top-1" in capsys.readouterr().out
    assert json.loads((folder / "settings.json").read_text())["where"]["dataset"] == str(image_folder)
    assert str(tmp_path) not in json.dumps(exchange.read_metadata(folder / "last.safetensors")["settings"]["dataset"])
    assert "where" not in exchange.read_metadata(folder / "last.safetensors")
    shutil.move(image_folder, tmp_path / "moved")
    message = error_of(capsys, "--resume", folder)
    assert "is not where it was" in message and "--dataset" in message


def test_a_fall_back_keeps_the_sound_generation(start, cut):
    folder = cut(10, "--save_every", 3)
    (folder / "state.pt").write_bytes(b"x")
    cut(11, "--resume", "auto", number=None)  # from step 9, killed before its first saving
    assert not (folder / "state.pt").exists() and (folder / "state.previous.pt").exists()
    cut(13, "--resume", "auto", number=None)
    assert torch.load(folder / "state.pt", weights_only=True)["step"] == 12
    assert torch.load(folder / "state.previous.pt", weights_only=True)["step"] == 9


def test_the_tensors_of_the_state_do_not_stay_in_memory(start, cut, monkeypatch):
    folder, opened, real = cut(5), [], train.open_run
    monkeypatch.setattr(train, "open_run", lambda flags: opened.append(real(flags)) or opened[0])
    resume(folder)

    def tensors(value):
        inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        return isinstance(value, torch.Tensor) + sum(map(tensors, inside))
    assert opened[0].step == 5 and tensors(opened[0].content) == 0
    assert tensors(torch.load(folder / "state.pt", weights_only=True)) > 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_the_final_scoring_leaves_it_to_the_run_that_continues(number, start, monkeypatch, capsys):
    flags = ("--val_fraction", 0.25, "--eval_batch_size", 2)
    whole, real = start(*flags, name="whole"), scoring.score

    def score(*args):
        os.kill(os.getpid(), number)
        return real(*args)
    with monkeypatch.context() as patch:
        patch.setattr(scoring, "score", score)
        with pytest.raises(SystemExit) as stop:
            start(*flags)
    assert stop.value.code == 128 + number and f"stopped after step {STEPS}, which is saved" in capsys.readouterr().out
    folder = whole["folder"].with_name("run")
    assert resume(folder)["last"] == whole["last"] and differences(whole["folder"], folder) == []


def test_auto_leaves_a_folder_alone_that_is_no_run(start, tmp_path, capsys):
    folder = tmp_path / "output" / "run"
    (folder / "tensorboard").mkdir(parents=True)
    for name in ("tensorboard/mine", "metrics.jsonl", "settings.json", "download.part"):
        (folder / name).write_text("mine")
    with pytest.raises(SystemExit):
        start("--resume", "auto")
    assert "holds a run already" in capsys.readouterr().err
    assert all((folder / name).read_text() == "mine" for name in ("tensorboard/mine", "settings.json", "download.part"))


def test_a_wrong_folder_is_told_from_the_right_one(cut, tmp_path, capsys, monkeypatch):
    folder = cut(3)
    monkeypatch.chdir(tmp_path)
    assert f"There is no run at run. Did you mean {Path('output/run')}?" in error_of(capsys, "--resume", "run")
    assert "output is no run but holds some: give one of them, such as --resume output/run" in error_of(
        capsys, "--resume", "output")
    assert folder.is_dir()
