"""Reports of runs that the tests write themselves, so that each number is known, and of one that train.py wrote."""

import csv
import json
import re
import shutil
import subprocess
import time
from dataclasses import asdict
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from models.attention import rollout
from tests.pages import CLASSES, Page, page_of, write_run
from tests.test_charts import fit
from utils import charts, data, report
from utils.charts import thin
from utils.evaluation import calibration_error
from utils.history import read
from utils.page import Html
from utils.pictures import over_pixels, overlay
from utils.settings import Settings


@pytest.fixture
def make(tmp_path, tiny_model):
    """make(name, ...) -> the folder of a run, see `write_run`."""
    return partial(write_run, tmp_path, tiny_model)


@pytest.fixture
def no_charts(monkeypatch):
    """Where only words count: charts take most of the time."""
    monkeypatch.setattr(charts, "svg", lambda *_: Html("<svg></svg>"))


def series_of(folder):
    return read(folder).series


# --- Curves ----------------------------------------------------------------------------------------------------------

def test_curves_and_values_are_those_of_the_file(make):
    folder = make()
    page, known = page_of(folder), series_of(folder)
    for chart in report.CHARTS:
        for name in chart.names:
            if name.startswith("train"):
                drawn = page.curve(f"{chart.id}-{name}.0")
                assert len(drawn) == len(known[name].steps) > 3
                for column, values in enumerate(known[name]):
                    assert fit(values, drawn[:, column])[1] < 1e-4
    rows = {row[0]: row[1:] for row in page.table("least")[1:]}
    for what, name in {"Loss, train": "train/loss", "Accuracy, test": "test/accuracy",
                       "Images a second": "train/images_per_second"}.items():
        values = known[name].values
        assert rows[what] == [f"{value:.4g}" for value in (values[-1], values.min(), values.max())]


def test_twenty_thousand_steps_are_a_small_page_with_every_extreme(tmp_path):
    folder, rng = tmp_path / "long", np.random.default_rng(0)
    folder.mkdir()
    names = ("loss", "accuracy", "lr", "grad_norm", "images_per_second")
    table = rng.lognormal(size=(20_000, len(names)))
    table[12_345, 0], table[777, 3] = 50, 1e-9
    with open(folder / "metrics.jsonl", "w") as file:
        for step, row in enumerate(table.tolist(), start=1):
            for name, value in zip(names, row):
                file.write(f'{{"step": {step}, "name": "train/{name}", "value": {value!r}, "time": {1e9 + step}}}\n')
    started = time.perf_counter()
    file = report.write([folder])
    assert time.perf_counter() - started < 20 and file.stat().st_size < 3e6
    page = Page(file.read_text())
    for chart, name, values in zip(("loss", "accuracy", "rate", "norm", "speed"), names, table.T):
        drawn, kept = page.curve(f"{chart}-train/{name}.0"), thin(values)
        assert len(drawn) == len(kept) < 1000
        assert fit(kept + 1, drawn[:, 0])[1] < 1e-4 and fit(values[kept], drawn[:, 1])[1] < 1e-4
        assert {values.argmin(), values.argmax()} <= set(kept)


def test_values_that_were_not_finite_are_gaps(make):
    folder = make(values={("train/loss", 7): None, ("train/grad_norm", 1): None})
    page, known = page_of(folder), series_of(folder)
    assert len(page.curve("loss-train/loss.0")) == 39 and np.isnan(known["train/loss"].values).sum() == 1
    assert re.findall("[ML]", page.paths["loss-train/loss.0"]).count("M") == 2


# --- Numbers ---------------------------------------------------------------------------------------------------------

@pytest.mark.usefixtures("no_charts")
def test_the_result_and_what_the_run_was(make):
    page = page_of(make(train_batch_size=64))
    for words in ("80.00 %", "test accuracy of 25 images, last.safetensors of step 40", "40, each of 64 images",
                  "ViT-X.npz (sha256 0123456789ab)", "custom, 16 x 16 px", "cpu, float32", "1 min 18 s",
                  "125 images/s"):
        assert words in page.text, words
    assert page.title == "run" and "of 40" not in page.text


@pytest.mark.usefixtures("no_charts")
def test_classes_confusions_and_calibration_are_those_of_the_predictions(make):
    folder = make()
    page, said = page_of(folder), read(folder).predictions
    rows = {row[0]: row[1:] for row in page.table("recall")[1:]}
    for c, name in enumerate(CLASSES):
        there, taken = said.labels == c, said.predicted == c
        right = (there & taken).sum().item()
        recall, precision = right / there.sum().item(), right / taken.sum().item()
        f1 = 2 * precision * recall / (precision + recall)
        assert rows[name] == [f"{100 * recall:.2f} %", f"{100 * f1:.2f} %", "5"]
    matrix = page.table("ant")
    for c, row in enumerate(matrix[1:]):
        counts = [int(cell or 0) for cell in row[1:]]
        assert row[0] == CLASSES[c] and counts == [4 * (c == k) + ((c + 1) % 5 == k) for k in range(5)]
    error = calibration_error(said.confidence, said.right)
    assert f"Expected calibration error {100 * error:.2f} %" in page.text
    assert "balanced accuracy80.00 %" in page.text and "80.00 % (5 wrong)" in page.text


@pytest.mark.usefixtures("no_charts")
def test_of_many_classes_the_worst_are_shown(make, tiny_config):
    names = [f"c{i:02}" for i in range(40)]
    answers = [(name, name, 0.9) for name in names] + [("c07", "c08", 0.8)] * 3 + [("c30", "c31", 0.7)]
    page = page_of(make(answers=answers, classes=names))
    assert "The 15 of the lowest F1, of 40 classes." in page.text and len(page.table("recall")) == 16
    assert page.table("recall")[1][:2] == ["c07", "25.00 %"]
    assert page.table("taken for")[1:] == [["c07", "c08", "3 of 4"], ["c30", "c31", "1 of 2"]]


@pytest.mark.usefixtures("no_charts")
def test_mistakes_are_the_surest_ones_as_the_model_saw_them(make, tiny_model, tmp_path):
    folder = make()
    page, said = page_of(folder), read(folder).predictions
    assert len(page.images) == 10 and page.text.count(" sure, image ") == 5
    for place, (image, attention) in zip((20, 15, 10, 5, 0), zip(page.images[::2], page.images[1::2])):
        pixels = np.array(Image.open(tmp_path / "images" / f"{place}.png"))
        assert np.array_equal(image, pixels)  # stored without loss
        seen = (torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255 - 0.5) / 0.5
        expected = overlay(pixels, over_pixels(tiny_model, rollout(tiny_model, seen))[0])
        assert np.abs(attention.astype(int) - expected).max() <= 2
        label, predicted = said.classes[said.labels[place]], said.classes[said.predicted[place]]
        assert f"{label} taken for {predicted}{40 + 2 * place:.2f} % sure, image" in page.text


@pytest.mark.usefixtures("no_charts")
def test_nothing_wrong_is_said(make):
    page = page_of(make(answers=[(name, name, 0.9) for name in CLASSES]))
    assert "All 5 images are right." in page.text and "100.00 % (0 wrong)" in page.text


@pytest.mark.usefixtures("no_charts")
def test_settings_show_what_is_not_the_default_and_the_command(make):
    folder = make(learning_rate=0.5, img_size=(16, 16))
    page = page_of(folder)
    changed, everything = (table for table in page.tables if table[0][0] == "setting")
    assert ["learning_rate", "0.5", "0.03"] in changed and ["img_size", "16, 16", "–"] in changed
    precision = ["precision", "auto → float32", "auto"]  # found, and not asked for
    assert precision in everything and precision not in changed
    assert {row[0] for row in everything[1:]} == set(asdict(Settings())) and len(changed) == 5  # head, data, steps
    commands = "python train.py --name 'a b'", f"python train.py --resume {folder}", f"python evaluate.py {folder}"
    assert all(command in page.text for command in commands) and "2.9.1" in page.text


# --- One file --------------------------------------------------------------------------------------------------------

def test_nothing_outside_is_asked_for_and_ids_are_unique(make):
    for page in (page_of(make("a")), page_of(make("b"), make("c"))):
        assert page.asks() == []
        assert not {"script", "iframe", "object", "base", "form"} & {name for name, _ in page.elements}
        ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
        assert len(ids) == len(set(ids)) > 20
        policy = next(found["content"] for _, found in page.elements if "http-equiv" in found)
        assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


@pytest.mark.usefixtures("no_charts")
def test_names_of_any_kind_are_text(make):
    odd = ("<b>&\"'", "$x_1^{$", "日本語", "</script><img src=x>", "{x}%s\\n")
    folder = make("a <i>&run", classes=odd)
    page, raw = page_of(folder), (folder / "report.html").read_text(encoding="utf-8")
    assert page.title == "a <i>&run" and "i" not in {name for name, found in page.elements if "style" not in found}
    assert [row[0] for row in page.table("recall")[1:]] == list(odd) and page.asks() == []
    assert not any(name in raw for name in odd[:1] + odd[3:4])


def test_the_same_run_gives_the_same_bytes(make):
    folder = make()
    before = report.write([folder]).read_bytes()
    assert report.write([folder]).read_bytes() == before and len(before) < 300_000


# --- Several labels an image -----------------------------------------------------------------------------------------

@pytest.mark.usefixtures("no_charts")
def test_several_labels_have_no_confidence(make):
    folder = make(about={"multi_label": True, "map": {"test": 0.6543}, "accuracy": {"test": 0.5}})
    with open(folder / "predictions.csv", "w", newline="") as file:
        csv.writer(file).writerows([["image", "label", "predicted"], ["a", "ant|bee", "ant"], ["b", "", ""],
                                    ["c", "bee", "bee|cat"], ["d", "dog", "dog"]])
    page = page_of(folder)
    assert "65.43 %" in page.text and "test mean average precision (mAP) of 4 images" in page.text
    assert page.table("recall") == [["class", "precision", "recall", "F1", "images"],
                                    ["ant", "100.00 %", "100.00 %", "100.00 %", "1"],
                                    ["bee", "100.00 %", "50.00 %", "66.67 %", "2"],
                                    ["cat", "0.00 %", "0.00 %", "0.00 %", "0"],
                                    ["dog", "100.00 %", "100.00 %", "100.00 %", "1"]]
    assert "all labels right50.00 % (2 wrong)" in page.text
    assert "Confusion" not in page.text and "alibration" not in page.text and "mistakes" not in page.text


# --- Several runs ----------------------------------------------------------------------------------------------------

def test_runs_are_compared(make, tmp_path):
    a = make("a", learning_rate=0.5)
    b = make("b", learning_rate=0.25, answers=[(name, name, 0.9) for name in CLASSES])
    file = report.write([a, b, a])
    assert file == tmp_path / "output" / "report.html"
    page = Page(file.read_text())
    for run, folder in enumerate((a, b)):
        known, drawn = series_of(folder)["train/loss"], page.curve(f"loss-train/loss.{run}")
        assert fit(known.values, drawn[:, 1])[1] < 1e-4
    rows = {row[0]: row[1:] for row in page.table("a")}
    assert rows["result"] == ["80.00 %", "100.00 %"] and rows["learning_rate"] == ["0.5", "0.25"]
    assert rows["took"] == ["1 min 18 s"] * 2 and "num_steps" not in rows and rows["images/s"] == ["125", "125"]
    assert page.asks() == [] and "accuracy-train/accuracy.0" not in page.paths


@pytest.mark.usefixtures("no_charts")
def test_runs_of_one_name_are_told_apart_by_their_folders(make):
    a, b = make("x/run"), make("y/run")
    page = page_of(a, b)
    assert page.table(str(a))[0] == ["", str(a), str(b)]


# --- A run of train.py -----------------------------------------------------------------------------------------------

def test_a_run_of_train(small_run):
    result = small_run("--val_fraction", 0.25)
    folder = result["folder"]
    page, known = page_of(folder), series_of(folder)
    assert f"{100 * result['best'].accuracy:.2f} %" in page.text and "best.safetensors" in page.text
    assert fit(known["train/loss"].values, page.curve("loss-train/loss.0")[:, 1])[1] < 1e-4
    assert {"loss-val/loss.0", "loss-test/loss.0", "accuracy-val/accuracy.0", "rate-train/lr.0"} <= page.paths.keys()
    assert read(folder).problems == () and "12 images" in page.text
    wrong = round(12 * (1 - result["best"].accuracy))
    assert len(page.images) == 2 * wrong


@pytest.mark.usefixtures("no_charts")
def test_a_set_in_memory_has_its_images_by_number(make):
    folder = make()
    settings = json.loads((folder / "settings.json").read_text())
    (folder / "settings.json").write_text(json.dumps({**settings, "dataset": "digits", "where": {"dataset": "digits"}}))
    rows = (folder / "predictions.csv").read_text().splitlines()
    numbered = [rows[0], *(f"{i},{row.partition(',')[2]}" for i, row in enumerate(rows[1:]))]
    (folder / "predictions.csv").write_text("\n".join(numbered) + "\n")
    page, digits = page_of(folder), data.load("digits").test.images
    assert len(page.images) == 10 and page.images[0].shape == (16, 16, 3)
    assert abs(page.images[0].mean() - digits[20].float().mean().item()) < 5  # 8 px, enlarged
    (folder / "settings.json").write_text(json.dumps({**settings, "dataset": "cifar10", "data_dir": "nowhere",
                                                      "where": {"dataset": "cifar10", "data_dir": "nowhere"}}))
    assert "cifar10 is no longer in nowhere." in page_of(folder).text  # and is not downloaded


# --- Command line ----------------------------------------------------------------------------------------------------

def refused(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        report.main([str(word) for word in argv])
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1, err
    return err


@pytest.mark.usefixtures("no_charts")
def test_the_command_prints_where_the_report_is(make, capsys, tmp_path):
    folder = make()
    report.main([str(folder)])
    assert capsys.readouterr().out == f"{folder}/report.html\n"
    report.main([str(folder), "--output", str(tmp_path / "x.html")])
    report.main([str(folder), "--output", str(tmp_path / "x.html")])  # one of ours
    assert (tmp_path / "x.html").read_bytes() == (folder / "report.html").read_bytes()


@pytest.mark.usefixtures("no_charts")
def test_only_a_report_is_replaced(make, capsys, tmp_path):
    folder = make()
    (folder / "report.html").write_text("<html>mine</html>")
    assert "exists. Choose another --output, or --overwrite it." in refused(capsys, folder)
    assert (folder / "report.html").read_text() == "<html>mine</html>"
    report.main([str(folder), "--overwrite"])
    capsys.readouterr()
    assert "vit-finetune report" in (folder / "report.html").read_text()
    assert "is a folder" in refused(capsys, folder, "--output", tmp_path)
    assert "there is no folder" in refused(capsys, folder, "--output", tmp_path / "none" / "x.html")


@pytest.mark.usefixtures("no_charts")
def test_what_is_no_run_is_refused(make, capsys, tmp_path):
    folder = make()
    assert "There is no run at nowhere." in refused(capsys, "nowhere")
    assert "is a file; a report is of the folder of a run." in refused(capsys, folder / "metrics.jsonl")
    assert f"It holds some: give one of them, such as {folder}, or several." in refused(capsys, folder.parent)
    (tmp_path / "empty").mkdir()
    assert "is no run: it has neither settings.json nor metrics.jsonl." in refused(capsys, folder, tmp_path / "empty")
    assert not (folder / "report.html").exists() and not (folder.parent / "report.html").exists()
    assert "did you mean --output?" in refused(capsys, folder, "--ouput", "x.html")


# --- A browser -------------------------------------------------------------------------------------------------------

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MEASURE = """<!DOCTYPE html><body><iframe src="report.html" width="400"></iframe><iframe src="report.html" width="1280">
</iframe><script>
onload = () => {
  const pages = [...document.querySelectorAll("iframe")].map(frame => frame.contentDocument);
  console.log("MEASURED " + JSON.stringify(pages.map(page => {
    const letters = [...page.querySelectorAll("svg text")].map(text => text.getBoundingClientRect().height);
    return [page.documentElement.scrollWidth, letters.length, Math.min(...letters), page.title];
  })));
};
</script></body>"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
def test_a_browser_shows_the_page_without_complaint_and_not_wider_than_its_window(make, tmp_path):
    long = tuple(f"a-class-with-quite-a-long-name-{i}" for i in range(5))
    report.write([make("a-run-with-quite-a-long-name-too", classes=long)], tmp_path / "report.html")
    (tmp_path / "measure.html").write_text(MEASURE)
    done = subprocess.run([BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files",
                           f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--v=0", "--dump-dom",
                           f"file://{tmp_path / 'measure.html'}"], capture_output=True, text=True, timeout=120)
    said = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert len(said) == 1, said  # what this test says itself, and no complaint
    measured = json.loads(re.search(r"MEASURED (\[.*\])", said[0].replace('\\"', '"'))[1])
    for width, (across, letters, smallest, title) in zip((400, 1280), measured, strict=True):
        assert across <= width and letters > 40 and smallest >= 10 and title.startswith("a-run")
