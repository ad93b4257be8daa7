"""The runs of a table: order, choice, what is skipped, what fails, what a signal leaves; a script plays train.py."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from utils import grid
from utils.grid import Grid, run
from utils.prices import disk, price, said
from utils.protocols import Option, Row

REAL = grid.ROOT

# Leaves what a run of train.py leaves: accuracy on the held-out part is best for the rate 0.02. `slow` in its output
# folder makes it wait for a signal, after which it "goes on"; `busy` makes the first find another process at work.
# A rate of 9 fails, of 7 and 8 diverges, of 6 leaves nothing.
SCRIPT = '''
import json, os, signal, sys, time
from pathlib import Path
import numpy as np
from safetensors.numpy import save_file
words = sys.argv[1:]
flag = lambda name, default=None: words[words.index(name) + 1] if name in words else default
out = Path(flag("--output_dir"))
folder = out / flag("--name")
folder.mkdir(parents=True, exist_ok=True)
with open(out / "started.txt", "a") as file:
    print(flag("--name"), flag("--resume"), file=file)
rate, seed = float(flag("--learning_rate")), int(flag("--seed"))
if rate == 9:
    print("error: no such learning rate")
    sys.exit(2)
if rate in (7, 8):
    print("error: Update 3 was not made: the loss was not finite (learning rate 7). Try less.")
    print("a worker's last words")
    sys.exit(2)
if (out / "busy").exists():
    (out / "busy").unlink()
    print(f"error: Another process is writing to {folder}. Wait for its end, or choose another --name.")
    sys.exit(2)
if rate == 6:
    sys.exit(0)
with open(out / "threads.txt", "a") as file:
    print(os.environ.get("OMP_NUM_THREADS"), file=file)
if (out / "slow").exists():
    signal.signal(signal.SIGTERM, lambda *_: ((folder / "told").touch(), sys.exit(143)))
    lines = [{"step": k, "name": "train/loss", "value": 1, "time": 2 * k + 50 * (k > 1)} for k in range(4)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + chr(10) for line in lines) + '{"step": 4, "na')
    (folder / "state.pt").write_text("half")
    time.sleep(60)
accuracy = {"test": 0.5 + rate + seed / 100, **({"val": 1 - abs(rate - 0.02)} if "--val_fraction" in words else {})}
about = {"accuracy": accuracy, "versions": {"torch": "2"}, "finetuned_from": {"name": "x", "sha256": "0"},
         "fingerprint": "f", "settings": {"resolved": {"device": "cpu"}}, "config": {}}
save_file({"head.bias": np.zeros(1, np.float32)}, folder / "last.safetensors", metadata={"vit": json.dumps(about)})
(folder / "settings.json").write_text(json.dumps({"num_steps": 4}))
lines = [{"step": k, "name": "test/accuracy", "value": value, "time": k} for k, value in
         ((2, accuracy["test"] + 0.25), (4, accuracy["test"]))]
(folder / "metrics.jsonl").write_text("".join(json.dumps(line) + chr(10) for line in lines))
(folder / "state.pt").write_text("whole")
'''


def row(*rates, dataset="cifar10", **options):
    return Row("mini", "ViT-demo", "checkpoint/ViT-demo.npz", dataset, 32, tuple(Option(4, 1, rate) for rate in rates),
               held_out=0.1, **options)


@pytest.fixture
def whole(tmp_path, monkeypatch):
    """whole(row, ... seeds=2) -> a grid whose runs are played."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "train.py").write_text(SCRIPT)
    monkeypatch.setattr(grid, "ROOT", tmp_path / "code")
    (tmp_path / "out").mkdir()
    return lambda *rows, seeds=2: Grid(list(rows), tmp_path / "out", seeds)


def started(whole):
    return [line.split()[0].split("/")[1] for line in (whole.folder / "started.txt").read_text().splitlines()]


def parent(one, devices):
    """A process that runs a row of two rates."""
    code = ("import sys\nfrom pathlib import Path\nfrom utils import grid\nfrom utils.protocols import Option, Row\n"
            f"grid.ROOT = Path({str(grid.ROOT)!r})\n"
            "row = Row('mini', 'ViT-demo', 'checkpoint/ViT-demo.npz', 'cifar10', 32, (Option(4, 1, 0.01), Option(4, 1, "
            f"0.02)), held_out=0.1)\ngrid.run(grid.Grid([row], Path({str(one.folder)!r}), 2), {devices})\n")
    return subprocess.Popen([sys.executable, "-c", code], cwd=REAL)


def wait_for(*files):
    for _ in range(600):
        if all(file.exists() for file in files):
            return True
        time.sleep(0.05)
    return False


def test_the_best_on_the_held_out_part_is_run_on_all_of_train_for_each_seed(whole):
    one = whole(row(0.01, 0.02, 0.1))
    assert run(one, [""]) == []
    assert started(one) == ["choose-4-0.01-seed0", "choose-4-0.02-seed0", "choose-4-0.1-seed0", "final-4-0.02-seed0",
                            "final-4-0.02-seed1"]
    assert one.chosen(one.rows[0]) == Option(4, 1, 0.02)
    results = one.finals(one.rows[0])
    assert [result["last"] for result in results] == [0.52, 0.53] and all(result["val"] is None for result in results)
    assert [result["best_on_test"] for result in results] == [0.77, 0.78]


def test_a_cell_keeps_what_one_needs_to_trust_it(whole):
    one = whole(row(0.5), seeds=1)
    run(one, [""])
    (result,) = one.finals(one.rows[0])
    assert result["commit"] is None or len(result["commit"]) >= 40
    assert {"command", "versions", "data", "checkpoint", "seed", "resolved", "hardware", "minutes"} <= result.keys()
    assert result["command"].startswith("python train.py --model_type ViT-demo") and "--seed 0" in result["command"]
    folder = one.path(one.rows[0].finals(one.rows[0].options[0], 1)[0])
    assert (folder / "metrics.jsonl").exists() and not (folder / "state.pt").exists()


def test_what_is_done_is_not_done_again(whole):
    one = whole(row(0.01, 0.02), row(0.3, dataset="digits"))
    run(one, [""])
    before = {path: path.stat().st_mtime_ns for path in one.folder.rglob("result.json")}
    assert run(one, [""]) == [] and len(started(one)) == 4 + 2
    assert {path: path.stat().st_mtime_ns for path in one.folder.rglob("result.json")} == before
    more = whole(*one.rows, seeds=3)
    run(more, [""])
    assert started(one)[6:] == ["final-4-0.02-seed2", "final-4-0.3-seed2"]


def test_a_failed_cell_is_reported_and_the_others_are_finished(whole, caplog):
    one = whole(row(0.01, 9.0), row(0.5, dataset="digits"))
    failed = run(one, [""])
    assert [cell.name for cell in failed] == ["cifar10-ViT-demo-32-4/choose-4-9-seed0"]
    assert "failed (exit code 2): error: no such learning rate" in caplog.text
    assert one.finals(one.rows[0]) == [] and len(one.finals(one.rows[1])) == 2


def test_devices_run_side_by_side(whole):
    one = whole(row(0.01, 0.02, 0.03))
    run(one, ["", "", ""])
    assert sorted(started(one)[:3]) == [f"choose-4-{rate}-seed0" for rate in ("0.01", "0.02", "0.03")]
    assert len(started(one)) == 5


def test_a_killed_grid_goes_on_and_repeats_no_finished_cell(whole, tmp_path):
    one = whole(row(0.01, 0.02))
    run(whole(row(0.01)), [""])  # two finished cells: `choose` is another folder, so they stay
    (one.folder / "slow").touch()
    process = parent(one, [''])
    half = one.path(one.rows[0].choosing()[0]) / "state.pt"
    assert wait_for(half)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(timeout=30) == 143 and half.exists()
    (one.folder / "slow").unlink()
    before = len(started(one))
    assert run(one, [""]) == []
    lines = (one.folder / "started.txt").read_text().splitlines()[before:]
    assert [line.split("/")[1] for line in lines] == [
        "choose-4-0.01-seed0 auto", "choose-4-0.02-seed0 auto", "final-4-0.02-seed0 auto", "final-4-0.02-seed1 auto"]


def test_a_folder_of_another_run_is_refused(whole):
    one = whole(row(0.5), seeds=1)
    run(one, [""])
    other = whole(row(0.5, batch=64), seeds=1)
    with pytest.raises(ValueError, match="holds another run than this table's: choose another --output_dir"):
        other.finals(other.rows[0])
    file = next(one.folder.rglob("result.json"))
    file.write_text("{")
    with pytest.raises(ValueError, match="result.json is damaged"):
        one.finals(one.rows[0])


def test_flags_become_words():
    one = row(0.5, flags=(("no_flip", True), ("momentum_dtype", "bfloat16")))
    words = Grid([one], Path("out"), 1, ("--device", "cpu")).command(one.finals(one.options[0], 1)[0])
    assert "--no_flip" in words and words[words.index("--no_flip") + 1].startswith("--")
    assert words[words.index("--device") + 1] == "cpu" and words[-3:] == ["--resume", "auto", "--no_report"]
    assert json.loads(json.dumps(one.finals(one.options[0], 1)[0].flags()))["learning_rate"] == 0.5


def edit(one, cell, **values):
    file = one.path(cell) / "result.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_a_candidate_that_diverged_is_a_result_and_never_chosen(whole, caplog):
    caplog.set_level("INFO")
    one = whole(row(7.0, 0.02), seeds=1)
    assert run(one, [""]) == [] and one.chosen(one.rows[0]) == Option(4, 1, 0.02)
    result = one.result(one.rows[0].choosing()[0])
    assert result["val"] is None and result["diverged"].startswith("Update 3 was not made: the loss was not finite")
    assert "it diverged, and is not chosen (Update 3" in caplog.text
    assert run(one, [""]) == [] and len(started(one)) == 3
    for value in (None, float("nan")):
        edit(one, one.rows[0].choosing()[1], val=value)
        assert one.chosen(one.rows[0]) is None and one.blocked(one.rows[0])


def test_a_row_whose_candidates_all_diverged_is_said(whole, caplog):
    one = whole(row(7.0, 8.0), row(0.5, dataset="digits"), seeds=1)
    assert run(one, [""]) == one.rows[0].choosing() and len(one.finals(one.rows[1])) == 1
    assert "cifar10-ViT-demo-32-4: all of its 2 candidates diverged" in caplog.text
    assert one.to_do(one.rows[0]) == []
    assert run(one, [""]) == one.rows[0].choosing() and len(started(one)) == 3  # they are not run again


def test_a_run_that_counts_and_diverged_has_failed(whole):
    one = whole(row(7.0), seeds=1)
    assert len(run(one, [""])) == 1 and one.finals(one.rows[0]) == []


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells the children")
def test_a_parent_that_is_killed_takes_its_runs_with_it(whole):
    one = whole(row(0.01, 0.02))
    (one.folder / "slow").touch()
    process = parent(one, ['', ''])
    folders = [one.path(cell) for cell in one.rows[0].choosing()]
    assert wait_for(*(folder / "state.pt" for folder in folders))
    process.kill()
    process.wait()
    assert wait_for(*(folder / "told" for folder in folders))


def test_an_error_ends_what_is_under_way(whole, monkeypatch):
    one = whole(row(0.01, 0.02))
    (one.folder / "slow").touch()
    folders = [one.path(cell) for cell in one.rows[0].choosing()]

    def sign(*_):
        assert wait_for(*(folder / "state.pt" for folder in folders))
        raise RuntimeError("no more")
    monkeypatch.setattr(grid, "SPEAK", 0)
    monkeypatch.setattr(grid, "sign", sign)
    with pytest.raises(RuntimeError, match="no more"):
        run(one, ["", ""])
    assert all((folder / "told").exists() and float((folder / "seconds").read_text()) > 0 for folder in folders)


def test_a_cell_of_another_process_is_waited_for(whole, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(grid, "RETRY", 0.5)
    one = whole(row(0.01), seeds=1)
    (one.folder / "busy").touch()
    assert run(one, [""]) == [] and len(started(one)) == 2 and len(one.finals(one.rows[0])) == 1
    assert caplog.text.count("another process is at work on it") == 1


@pytest.mark.parametrize("text", ["", "12.", "x", "nan", "-5"])
def test_seconds_of_failed_attempts_count_and_damaged_ones_are_none(whole, text):
    one = whole(row(9.0), seeds=1)
    folder = one.path(one.rows[0].finals(one.rows[0].options[0], 1)[0])
    folder.mkdir(parents=True)
    (folder / "seconds").write_text(text)
    run(one, [""])
    assert float((folder / "seconds").read_text()) > (12 if text == "12." else 0)


def test_only_what_is_to_be_done_is_priced(whole):
    one = whole(row(0.01, 0.02), seeds=2)
    full = price(one.rows[0], 2, (1000, 100), 10.0, 7, one.to_do(one.rows[0]))
    assert full == price(one.rows[0], 2, (1000, 100), 10.0, 7) and full.cells == 4
    assert full.disk == 4 * 2 * 7 and disk([full], 3) == 4 * 2 * 7 + 3 * 9 * 7
    assert disk([full] * 2) == 8 * 2 * 7 + 9 * 7  # one under way, not one a row
    assert one.done() == (0, 4)
    run(one, [""])
    nothing = price(one.rows[0], 2, (1000, 100), 10.0, 7, one.to_do(one.rows[0]))
    assert nothing.cells == nothing.seconds == disk([nothing], 3) == 0 and one.done() == (4, 4)
    assert said([nothing], 1) == "nothing is left to be done"
    assert price(one.rows[0], 3, (1000, 100), 10.0, 7, whole(*one.rows, seeds=3).to_do(one.rows[0])).cells == 1


def test_signs_of_life_tell_the_step_and_the_time_left(whole, monkeypatch, caplog):
    caplog.set_level("INFO")
    one = whole(row(0.01), seeds=1)
    (one.folder / "slow").touch()
    (cell,) = one.rows[0].finals(one.rows[0].options[0], 1)
    assert grid.sign(one.path(cell), 4) == "no step of 4 yet"
    monkeypatch.setattr(grid, "SPEAK", 0.2)
    real = grid.sign

    def sign(folder, total):
        assert wait_for(folder / "state.pt")
        os.kill(os.getpid(), signal.SIGTERM)
        return real(folder, total)
    monkeypatch.setattr(grid, "sign", sign)
    with pytest.raises(SystemExit) as stop:
        run(one, [""])
    assert stop.value.code == 143 and "0 of 1 cells are done; under way:" in caplog.text
    assert "step 3 of 4, 2 s a step, 00:02 left" in caplog.text


@pytest.mark.parametrize("text", ["[]", "{}", "{", '{"flags": {}}', "3"])
def test_a_damaged_result_is_said(whole, text):
    one = whole(row(0.5), seeds=1)
    run(one, [""])
    next(one.folder.rglob("result.json")).write_text(text)
    with pytest.raises(ValueError, match="result.json is damaged .*: remove the folder, and its run is done again"):
        one.finals(one.rows[0])


def test_a_run_that_leaves_no_weights_is_one_failed_cell(whole, caplog):
    one = whole(row(6.0), row(0.5, dataset="digits"), seeds=1)
    assert [cell.option.rate for cell in run(one, [""])] == [6.0] and len(one.finals(one.rows[1])) == 1
    assert "it ended without the files of a whole run" in caplog.text


def test_hardware_is_that_of_the_run(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda index=0: f"GPU {index}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,3")
    assert grid.hardware("cuda:0", "3") == "GPU 1" and grid.hardware("cuda:1") == "GPU 1"
    assert grid.hardware("cpu", "3", 4).endswith(", 4 threads") and grid.hardware() == "GPU 0"
    assert grid.devices() == ["5", "3"] and grid.devices(1) == ["5"] and grid.devices(2, cpu=True) == ["", ""]


@pytest.mark.parametrize("values, word", [({"data": "g"}, "data"), ({"checkpoint": {"sha256": "1"}}, "checkpoint"),
                                          ({"resolved": {"precision": "bfloat16"}}, "precision")])
def test_runs_of_one_row_are_of_the_same_data_checkpoint_and_precision(whole, values, word):
    one = whole(row(0.01, 0.02))
    run(one, [""])
    last = one.rows[0].finals(Option(4, 1, 0.02), 2)[-1]
    edit(one, last, **values)
    with pytest.raises(ValueError, match=f"final-4-0.02-seed1 was run with another {word} than the other runs"):
        one.finals(one.rows[0])


def test_kept_back_images_follow_from_the_seed_and_may_differ(whole):
    one = whole(row(0.5, kept_back=0.1))
    run(one, [""])
    edit(one, one.rows[0].finals(Option(4, 1, 0.5), 2)[-1], data="g")
    assert len(one.finals(one.rows[0])) == 2


def test_workers_share_the_processors(whole, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for number in (0, -1):
        with pytest.raises(ValueError, match=f"--workers is {number}; it must be at least 1"):
            grid.devices(number)
    assert grid.devices() == [""] and grid.devices(3) == ["", "", ""]
    monkeypatch.setattr("torch.get_num_threads", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    one = whole(row(0.5), seeds=2)
    run(one, grid.devices(2))
    assert (one.folder / "threads.txt").read_text().split() == ["4", "4"]
    assert all(result["hardware"].endswith(", 4 threads") for result in one.finals(one.rows[0]))
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    run(whole(*one.rows, seeds=3), grid.devices(2))
    assert (one.folder / "threads.txt").read_text().split()[2:] == ["3"]
