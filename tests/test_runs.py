import errno
import json

import numpy as np
import pytest
import torch

from models import exchange
from utils.optim import make_optimizer
from utils.progress import Progress
from utils.runs import FILES, Run, check_free, full, sha256, weights_of
from utils.state import State
from utils.step import make_scaler


def about(**settings):
    return {"settings": settings, "where": {"dataset": "digits"}, "classes": ["a", "b", "c", "d", "e"]}


def state_of(model, step=7, **found):
    now = State(model, make_optimizer(model, "sgd"), make_scaler("cpu", torch.float32), step=step)
    now.last = {"step": step, "part": "val", "accuracy": 0.5, "loss": 1.0, "images": 4, "macro_f1": 0.4, "map": None}
    now.best = {**now.last, **found, "value": 0.5}
    now.remember_best()
    return now


def progress_of(run):
    return Progress(run, 10, 8, scaled=False)


def test_metrics_are_one_line_an_event_and_go_to_tensorboard(tmp_path):
    with Run(tmp_path / "a", about(seed=1), "python train.py") as run:
        run.log(3, train_loss=0.5, train_images_per_second=10.0)
    lines = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert [(e["step"], e["name"], e["value"]) for e in lines] == [(3, "train/loss", 0.5),
                                                                  (3, "train/images_per_second", 10.0)]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(tmp_path / "a" / "tensorboard")).Reload()
    assert events.Scalars("train/loss")[0].value == 0.5 and events.Scalars("train/loss")[0].step == 3
    assert json.loads((tmp_path / "a" / "settings.json").read_text()) == {
        "seed": 1, "where": {"dataset": "digits"}, "command": "python train.py"}


def test_tensorboard_shows_a_step_that_was_repeated_once(tmp_path):
    with Run(tmp_path / "a", about(), "") as run:
        for step in (1, 2, 3):
            run.log(step, train_loss=float(step))
    with Run(tmp_path / "a", about(), "", metrics=0, step=2) as run:
        run.log(3, train_loss=30.0)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(tmp_path / "a" / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_saved_weights_explain_themselves(tmp_path, tiny_model):
    with Run(tmp_path / "a", about(), "python train.py --seed 1") as run:
        run.save(state_of(tiny_model), progress_of(run))
    found = exchange.read_metadata(tmp_path / "a" / "best.safetensors")
    assert found["classes"] == ["a", "b", "c", "d", "e"] and found["step"] == 7 and found["accuracy"] == {"val": 0.5}
    assert found["versions"]["torch"] == torch.__version__ and found["command"] == "python train.py --seed 1"
    assert found["config"]["mean"] == [0.5] * 3 and found["img_size"] == [16, 16] and found["grid"] == [4, 4]
    again = exchange.load(tmp_path / "a" / "best.safetensors")
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in tiny_model.state_dict().items())


def test_weights_are_written_when_they_change_and_only_as_what_they_are(tmp_path, tiny_model):
    """`last` is of the last evaluation: a saving between two leaves it alone."""
    folder = tmp_path / "a"
    with Run(folder, about(), "") as run:
        now, progress = state_of(tiny_model), progress_of(run)
        run.save(now, progress)
        first = {kind: (folder / f"{kind}.safetensors").stat().st_mtime_ns for kind in ("last", "best")}
        now.step = 8
        run.save(now, progress)
        assert first == {kind: (folder / f"{kind}.safetensors").stat().st_mtime_ns for kind in ("last", "best")}
        now.last = {**now.last, "step": 8, "accuracy": 0.25}
        run.save(now, progress)
    assert exchange.read_metadata(folder / "last.safetensors")["accuracy"] == {"val": 0.25}
    assert (folder / "best.safetensors").stat().st_mtime_ns == first["best"]


def test_a_saving_is_due_after_so_many_updates_or_so_much_time(tmp_path, tiny_model, monkeypatch):
    with Run(tmp_path / "a", about(), "") as run:
        assert not run.save_is_due(0, 5) and not run.save_is_due(4, 5) and run.save_is_due(10, 5)
        run.save(state_of(tiny_model, step=10), progress_of(run))
        assert not run.save_is_due(10, 5) and run.save_is_due(15, 5)
        assert not run.save_is_due(11, 0)
        monkeypatch.setattr("utils.runs.SAVE_SECONDS", -1)
        assert run.save_is_due(11, 0) and not run.save_is_due(10, 0)


def test_other_processes_than_the_first_write_nothing(tmp_path, tiny_model):
    with Run(tmp_path / "a", about(), "", writes=False) as run:
        run.log(1, train_loss=1.0)
        run.save(state_of(tiny_model), progress_of(run))
        run.mend(state_of(tiny_model))
    assert not (tmp_path / "a").exists()


def test_what_a_killed_process_left_half_written_is_cleared(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "state.pt.part").write_bytes(b"half")
    with Run(tmp_path / "a", about(), ""):
        assert not (tmp_path / "a" / "state.pt.part").exists()


def test_weights_of_a_run_are_its_best_where_a_held_out_part_chose_them(tmp_path, tiny_model):
    folder = tmp_path / "a"
    with Run(folder, about(), "") as run:
        with pytest.raises(ValueError, match="has had no evaluation yet"):
            weights_of(folder)
        run.save(state_of(tiny_model), progress_of(run))
    assert weights_of(folder) == folder / "best.safetensors"
    assert weights_of(folder, "last") == folder / "last.safetensors"
    now = state_of(tiny_model)
    now.last["part"] = now.best["part"] = "test"
    with Run(folder, about(), "") as run:
        run.save(now, progress_of(run))
    assert weights_of(folder) == folder / "last.safetensors"
    assert weights_of(tmp_path / "x.npz") == tmp_path / "x.npz"


@pytest.mark.parametrize("number, full_disk", [(errno.ENOSPC, True), (errno.EDQUOT, True), (errno.EFBIG, True),
                                               (errno.ENOENT, False), (None, False)])
def test_no_room_left_is_told_from_other_errors(number, full_disk):
    words = full(OSError(number, "x") if number else OSError("x"))
    assert ("make room, then continue with --resume" in words) if full_disk else words is None


def test_an_existing_run_is_refused_and_only_its_own_files_are_replaced(tmp_path):
    folder = tmp_path / "a"
    check_free(folder, overwrite=False)
    with Run(folder, about(), "") as run:
        run.log(1, train_loss=1.0)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=f"holds a run already. Continue it with --resume {folder}, choose another"):
        check_free(folder, overwrite=False)
    check_free(folder, overwrite=True)
    with Run(folder, about(), ""):
        pass
    assert (folder / "notes.txt").read_text() == "mine" and (folder / "metrics.jsonl").read_text() == ""
    assert {path.name for path in folder.iterdir()} <= {*FILES, "notes.txt"}


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "a").write_text("x")
    with pytest.raises(ValueError, match="is a file"):
        check_free(tmp_path / "a", overwrite=True)


def test_sha256_is_that_of_the_bytes(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_tensorboard_has_the_settings_as_hyper_parameters_and_the_images_that_are_shown(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    settings = about(seed=1, min_area=None, debug=True, no_flip=True, resolved={"min_area": 0.05})
    with Run(tmp_path / "a", settings, "python train.py") as run:
        run.show("train/images", np.full((5, 4, 6, 3), 9, np.uint8), step=0)
    events = EventAccumulator(str(tmp_path / "a" / "tensorboard")).Reload()
    assert (events.Images("train/images")[0].height, events.Images("train/images")[0].width) == (2 * 6 + 2, 3 * 8 + 2)
    about_hparams = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    known = HParamsPluginData.FromString(about_hparams).session_start_info.hparams
    assert known["seed"].number_value == 1 and known["min_area"].number_value == 0.05
    assert known["no_flip"].string_value == "True" and "debug" not in known
