import json

import pytest
import torch

from models import exchange
from utils.runs import FILES, Run, check_free, sha256


def test_metrics_are_one_line_an_event_and_go_to_tensorboard(tmp_path):
    with Run(tmp_path / "a", {"seed": 1}, "python train.py") as run:
        run.log(3, train_loss=0.5, train_images_per_second=10.0)
    lines = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert [(e["step"], e["name"], e["value"]) for e in lines] == [(3, "train/loss", 0.5),
                                                                  (3, "train/images_per_second", 10.0)]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(tmp_path / "a" / "tensorboard")).Reload()
    assert events.Scalars("train/loss")[0].value == 0.5 and events.Scalars("train/loss")[0].step == 3
    assert json.loads((tmp_path / "a" / "settings.json").read_text())["seed"] == 1


def test_saved_weights_explain_themselves(tmp_path, tiny_model):
    with Run(tmp_path / "a", {}, "python train.py --seed 1") as run:
        path = run.save("best", tiny_model, classes=["a", "b", "c", "d", "e"], step=7)
    about = exchange.read_metadata(path)
    assert about["classes"] == ["a", "b", "c", "d", "e"] and about["step"] == 7
    assert about["versions"]["torch"] == torch.__version__ and about["command"] == "python train.py --seed 1"
    assert about["config"]["mean"] == [0.5] * 3 and about["img_size"] == [16, 16] and about["grid"] == [4, 4]
    again = exchange.load(path)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in tiny_model.state_dict().items())


def test_an_existing_run_is_refused_and_only_its_own_files_are_replaced(tmp_path):
    folder = tmp_path / "a"
    check_free(folder, overwrite=False)
    with Run(folder, {}, "") as run:
        run.log(1, train_loss=1.0)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds a run already. Choose another --name, or --overwrite it"):
        check_free(folder, overwrite=False)
    check_free(folder, overwrite=True)
    with Run(folder, {}, ""):
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
