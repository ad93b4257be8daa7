"""What is missing or damaged in a run's folder is said in its report, and the rest is there."""

import json
import shutil
from functools import partial

import numpy as np
import pytest

from tests.pages import page_of, write_run
from utils import charts
from utils.history import read
from utils.page import Html


@pytest.fixture
def make(tmp_path, tiny_model, monkeypatch):
    """make(name, ...) -> the folder of a run, see `write_run`; charts, which take most of the time, are left out."""
    monkeypatch.setattr(charts, "svg", lambda name, *_: Html(f'<svg id="{name}"></svg>'))
    return partial(write_run, tmp_path, tiny_model)


def test_a_run_without_predictions_says_so(make, caplog):
    folder = make()
    (folder / "predictions.csv").unlink()
    page = page_of(folder)
    assert "predictions.csv is missing" in page.text and "predictions.csv is missing" in caplog.text
    assert "80.00 %" in page.text and ("svg", {"id": "loss"}) in page.elements and "sure, image" not in page.text


def test_a_run_that_was_never_evaluated(make):
    folder = make()
    for name in ("predictions.csv", "last.safetensors"):
        (folder / name).unlink()
    page = page_of(folder)
    assert "No result yet" in page.text and "it has had no evaluation yet" in page.text


def test_a_run_that_was_cut_off_says_how_far_it_came(make):
    folder = make(about={"step": 20, "accuracy": {"test": 0.25}})
    (folder / "predictions.csv").unlink()
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(line for line in lines if json.loads(line)["step"] < 31))
    page = page_of(folder)
    assert "25.00 %test accuracy, last.safetensors of step 20 (the run has not ended)" in page.text
    assert "30 of 40, each of 512 images" in page.text and f"python train.py --resume {folder}This" not in page.text


def test_images_that_are_gone_are_said(make, tmp_path):
    folder = make()
    (tmp_path / "images" / "20.png").write_text("no image")
    page = page_of(folder)
    assert len(page.images) == 8 and "20.png" in page.text and page.text.count(" sure, image ") == 5
    shutil.rmtree(tmp_path / "images")
    page = page_of(folder)
    assert "The images are no longer where they were" in page.text and page.text.count(" sure, image ") == 5


def test_a_project_that_moved_as_a_whole_still_has_its_images(make, tmp_path, monkeypatch):
    folder = make()
    settings = json.loads((folder / "settings.json").read_text())
    (tmp_path / "moved").mkdir()
    (tmp_path / "images").rename(tmp_path / "moved" / "images")
    (folder / "settings.json").write_text(json.dumps({**settings, "dataset": "images"}))
    monkeypatch.chdir(tmp_path / "moved")
    assert len(page_of(folder).images) == 10


def test_a_line_that_a_crash_cut_off_is_left_out(make):
    folder = make()
    before = read(folder).series["train/loss"].values
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 41, "name": "train/lo')
    page = page_of(folder)
    assert "1 line of metrics.jsonl is damaged" in page.text
    assert np.array_equal(read(folder).series["train/loss"].values, before)


def test_damaged_settings_are_those_of_the_weights(make):
    folder = make(about={"settings": {"num_steps": 40, "learning_rate": 0.25, "resolved": {}}})
    (folder / "settings.json").write_text('{"num_steps": 40, ')
    page = page_of(folder)
    assert "settings.json is damaged" in page.text and ["learning_rate", "0.25", "0.03"] in page.table("default")
    (folder / "settings.json").write_text("[]")
    assert "settings.json is damaged" in page_of(folder).text
    (folder / "settings.json").unlink()
    assert "settings.json is missing" in page_of(folder).text


@pytest.mark.parametrize("text", ["image,label\n1,ant\n", "image,label,predicted,confidence\n1,ant,fox,0.5\n", "",
                                  "image,label,predicted,confidence\n1,ant,bee,nan\n",
                                  "image,label,predicted,confidence\n1,ant\n", '"'])
def test_damaged_predictions_are_said(make, text):
    folder = make()
    (folder / "predictions.csv").write_text(text)
    assert "predictions.csv is damaged" in page_of(folder).text


def test_predictions_of_other_weights_are_left_out(make):
    folder = make(about={"accuracy": {"test": 0.5}})
    assert "predictions.csv describes other weights" in page_of(folder).text


def test_pauses_do_not_count_as_time(make):
    folder = make()
    assert read(folder).seconds == 78
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    events = list(map(json.loads, lines))
    first = next(event["time"] for event in events if event["step"] > 30)
    later = [{**event, "time": event["time"] + 1000 * (event["step"] > 30)} for event in events]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in later))
    settings = json.loads((folder / "settings.json").read_text())
    again = {"step": 31, "time": first + 500, "num_steps": 40}
    (folder / "settings.json").write_text(json.dumps({**settings, "continued": [again]}))
    assert read(folder).seconds == 76 and "continued at step 31, num_steps 40." in page_of(folder).text
