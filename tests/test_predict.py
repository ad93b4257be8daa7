"""predict.py as a user starts it; its classes are those of evaluate.py, image by image."""

import csv
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import evaluate
import predict
from models import exchange
from models.modeling import VisionTransformer
from models.npz import save_npz
from tests.conftest import randomise

CLASSES = ["blue", "green", "red", 'say "cheese", please', "Grün"]


@pytest.fixture
def model(tiny_model, image_folder):
    """Five classes, more than one of which is found."""
    from tests.test_evaluate import pixels
    with torch.no_grad():
        tiny_model.head.bias -= tiny_model(pixels(image_folder)).mean(dim=0)
    return tiny_model


@pytest.fixture
def run(model, image_folder, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "settings.json").write_text(json.dumps({"dataset": str(image_folder)}))
    exchange.save(model, folder / "last.safetensors", {"classes": CLASSES})
    return folder


@pytest.fixture
def ask(capsys):
    """ask(arguments ...) -> (standard output, standard error)"""
    def ask(*argv, code=0):
        words = [str(word) for word in (*argv, "--device", "cpu")]
        if code:
            with pytest.raises(SystemExit) as stop:
                predict.main(words)
            assert stop.value.code == code
        else:
            predict.main(words)
        return capsys.readouterr()
    return ask


def lines_of(out):
    return [json.loads(line) for line in out.splitlines()]


# --- What is predicted -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_the_class_of_each_image_is_evaluate_s(ask, run, image_folder, tmp_path, batch_size, capsys):
    evaluate.main([str(run), "--output", str(tmp_path / "rows.csv"), "--device", "cpu"])
    capsys.readouterr()
    with open(tmp_path / "rows.csv", newline="", encoding="utf-8") as file:
        expected = {row["image"]: (row["predicted"], float(row["confidence"])) for row in csv.DictReader(file)}
    out, _ = ask(run, image_folder / "test", "--format", "jsonl", "--batch_size", batch_size)
    found = {line["image"]: (line["label"], line["top"][0]["probability"]) for line in lines_of(out)}
    assert found.keys() == expected.keys() and len({label for label, _ in found.values()}) > 1
    for image, (label, probability) in found.items():
        assert label == expected[image][0] and probability == pytest.approx(expected[image][1], abs=2e-6)


def test_probabilities_are_those_of_the_model(ask, run, model, image_folder):
    from tests.test_evaluate import pixels
    lines = lines_of(ask(run, image_folder / "test", "--format", "jsonl", "--top_k", 99)[0])
    with torch.no_grad():
        probabilities = model(pixels(image_folder)).softmax(1)
    for line, row in zip(lines, probabilities):  # both sorted: class by class, then by name
        assert [answer["index"] for answer in line["top"]] == row.argsort(descending=True).tolist()
        assert [CLASSES[answer["index"]] for answer in line["top"]] == [answer["class"] for answer in line["top"]]
        for answer in line["top"]:
            assert answer["probability"] == pytest.approx(row[answer["index"]].item(), abs=2e-6)


def test_a_table_a_csv_and_json_say_the_same(ask, run, image_folder, tmp_path):
    images = [image_folder / "test" / name / "0.png" for name in ("red", "blue")]
    lines = lines_of(ask(run, *images, "--format", "jsonl", "--top_k", 3)[0])
    assert [line["image"] for line in lines] == list(map(str, images))
    rows = list(csv.DictReader(io.StringIO(ask(run, *images, "--format", "csv", "--top_k", 3)[0])))
    table = ask(run, *images, "--top_k", 3)[0].splitlines()
    assert len(table) == 1 + 3 * 2 and table[0].split() == ["image", "probability", "class"]
    for n, (line, row) in enumerate(zip(lines, rows)):
        assert row["image"] == line["image"] and row["label"] == line["label"] == line["top"][0]["class"]
        assert table[1 + 3 * n].startswith(line["image"])
        for k, answer in enumerate(line["top"]):
            assert row[f"class_{k + 1}"] == answer["class"]
            assert float(row[f"probability_{k + 1}"]) == pytest.approx(answer["probability"], abs=1e-6)
            assert table[1 + 3 * n + k].endswith(f"{100 * answer['probability']:.2f} %  {answer['class']}")


def test_a_file_without_names_answers_in_numbers(ask, tmp_path, tiny_model, image_folder):
    save_npz(tiny_model, tmp_path / "a.npz")
    line, = lines_of(ask(tmp_path / "a.npz", image_folder / "test" / "red" / "0.png", "--format", "jsonl")[0])
    assert line["label"] == str(line["top"][0]["index"])


def test_several_labels_have_a_probability_each(ask, run, model, image_folder):
    from tests.test_evaluate import pixels
    with torch.no_grad():
        model.head.bias += 1.0  # most labels are likely
        probabilities = model(pixels(image_folder)).sigmoid()
    exchange.save(model, run / "last.safetensors", {"classes": CLASSES, "multi_label": True})
    folder = image_folder / "test"
    lines = lines_of(ask(run, folder, "--format", "jsonl", "--top_k", 1)[0])
    for line, row in zip(lines, probabilities):
        assert sorted(line["labels"]) == sorted(CLASSES[c] for c in (row > 0.5).nonzero()[:, 0])
        assert len(line["top"]) == max(1, len(line["labels"])) and "label" not in line
        assert all(row[a["index"]].item() == pytest.approx(a["probability"], abs=2e-6) for a in line["top"])
    out, err = ask(run, folder, "--top_k", 1)
    assert out.count(" * ") == sum(len(line["labels"]) for line in lines) > 12 and "* more likely than not" in err
    rows = list(csv.DictReader(io.StringIO(ask(run, folder, "--format", "csv", "--top_k", 2)[0])))
    assert [row["labels"] for row in rows] == ["|".join(line["labels"]) for line in lines]
    assert list(rows[0]) == ["image", "labels", "class_1", "probability_1", "class_2", "probability_2"]


# --- Which images ----------------------------------------------------------------------------------------------------

def test_folders_are_searched_and_other_files_left(ask, run, image_folder, tmp_path):
    (image_folder / "test" / "notes.txt").write_text("no image")
    hidden = image_folder / "test" / ".cache"
    hidden.mkdir()
    shutil.copy(image_folder / "test" / "red" / "0.png", hidden)
    out, _ = ask(run, image_folder / "test", "--format", "jsonl")
    expected = sorted(map(str, (image_folder / "test").glob("[a-z]*/*.png")))
    assert [line["image"] for line in lines_of(out)] == expected and len(expected) == 12


def test_a_list_on_standard_input(ask, run, image_folder, tmp_path, monkeypatch):
    odd = tmp_path / os.fsdecode(b"caf\xe9\xff.png")  # no UTF-8, which file systems allow
    shutil.copy(image_folder / "test" / "red" / "0.png", odd)
    folder = image_folder / "test"
    listed = b"\n".join(map(os.fsencode, [folder / "red" / "1.png", odd, folder / "blue"]))
    for ending in (b"", b"\r\n\n"):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(listed + ending)))
        ask(run, "-", "--format", "csv", "--output", tmp_path / "a.csv", "--overwrite")
        with open(tmp_path / "a.csv", newline="", encoding="utf-8", errors="surrogateescape") as file:
            images = [row["image"] for row in csv.DictReader(file)]
        assert len(images) == 6 and images[0].endswith("red/1.png") and images[1] == str(odd)


def test_the_ending_of_the_output_is_its_format(ask, run, image_folder, tmp_path):
    for name, first in (("a.jsonl", "{"), ("a.csv", "image,label"), ("a.txt", "image  ")):
        out, _ = ask(run, image_folder / "test" / "red", "--output", tmp_path / name)
        assert out == "" and (tmp_path / name).read_text(encoding="utf-8").startswith(first)


def test_predictions_come_batch_after_batch(run, image_folder, monkeypatch, capsys):
    """The first ones are out before the last images are looked at."""
    seen, stream = [], predict.stream

    def watched(*args, **kwargs):
        for part in stream(*args, **kwargs):
            seen.append(len(capsys.readouterr().out.splitlines()))
            yield part
    monkeypatch.setattr(predict, "stream", watched)
    predict.main([str(run), str(image_folder / "test"), "--format", "jsonl", "--batch_size", "4", "--device", "cpu"])
    assert seen == [0, 4, 4]


# --- Broken and bad input --------------------------------------------------------------------------------------------

def test_broken_images_are_skipped_said_and_counted(ask, run, image_folder, monkeypatch):
    (image_folder / "test" / "green" / "2.png").write_bytes(b"text")
    Image.new("RGB", (1, 1)).save(image_folder / "test" / "green" / "3.png")  # tiny, and fine
    out, err = ask(run, image_folder / "test", "--format", "jsonl", "--batch_size", 5, code=1)
    assert len(lines_of(out)) == 11 and not any("green/2.png" in line["image"] for line in lines_of(out))
    assert err.count("2.png cannot be read") == 1 and "1 of 12 images could not be read" in err
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"no/such.png")))
    out, err = ask(run, "-", code=1)
    assert "no/such.png cannot be read" in err and "1 of 1 images" in err and out.split() == ["image", "probability",
                                                                                              "class"]


def test_worker_processes_predict_the_same(ask, run, image_folder, monkeypatch):
    (image_folder / "train" / "green" / "2.png").write_bytes(b"text")
    alone, _ = ask(run, image_folder, "--format", "jsonl", "--num_workers", 0, "--batch_size", 8, code=1)
    monkeypatch.setattr("utils.trained.PART", 1)
    out, err = ask(run, image_folder, "--format", "jsonl", "--num_workers", 2, "--batch_size", 8, code=1)
    assert out == alone and len(lines_of(out)) == 47 and err.count("2.png cannot be read") == 1


@pytest.mark.parametrize("argv, words", [
    (["RUN"], "IMAGE"), (["RUN", "nowhere.png"], "no image and no folder at nowhere.png"),
    (["RUN", "empty"], "empty holds no images"), (["RUN", "-"], "Standard input has named no image"),
    (["RUN", "a.png", "--top_k", "0"], "'0' is no whole number"), (["RUN", "a.png", "--format", "xml"], "xml"),
    (["RUN", "a.png", "--output", "precious.csv"], "exists"), (["RUN", "a.png", "--output", "empty"], "is a folder"),
    (["nowhere", "a.png"], "no checkpoint and no run at nowhere"), (["a.png", "a.png"], "a.png"),
    (["empty", "a.png"], "empty"), (["RUN", "a.png", "--img_size", "x"], "'x' is no image size"),
    (["RUN", "a.png", "--weights", "best"], "without best.safetensors"), (["zero.safetensors", "a.png"], "fine-tuning"),
    (["RUN", "a.png", "--device", "tpu"], "tpu")])
def test_bad_input_is_one_sentence_and_writes_nothing(argv, words, run, image_folder, tiny_config, tmp_path, capsys,
                                                      monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\n")))
    shutil.copy(image_folder / "test" / "red" / "0.png", "a.png")
    exchange.save(VisionTransformer(tiny_config, 16, 3), "zero.safetensors", {})
    Path("empty").mkdir()
    Path("precious.csv").write_bytes(b"precious")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        predict.main([str(run) if word == "RUN" else word for word in argv])
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and words in err, err
    *before_it, last = err.splitlines()  # the loader says of a head of zeros that it is one
    assert last.startswith("error: ") and len(before_it) == (words == "fine-tuning") and len(last) < 400
    assert sorted(tmp_path.rglob("*")) == before and Path("precious.csv").read_bytes() == b"precious"


def test_an_error_on_the_way_leaves_the_old_output(ask, run, image_folder, tmp_path, monkeypatch):
    (tmp_path / "a.csv").write_text("precious")
    stream = predict.stream

    def interrupted(*args, **kwargs):
        yield next(stream(*args, **kwargs))
        raise KeyboardInterrupt
    monkeypatch.setattr(predict, "stream", interrupted)
    _, err = ask(run, image_folder / "test", "--output", tmp_path / "a.csv", "--overwrite", code=130)
    assert "Interrupted" in err and "a.csv was not written" in err
    assert (tmp_path / "a.csv").read_text() == "precious" and not list(tmp_path.glob("*.part"))


def test_a_closed_pipe_ends_without_a_word(run, image_folder):
    command = f"{sys.executable} predict.py {run} {image_folder} --format jsonl --batch_size 1 --device cpu | head -n 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=Path(predict.__file__).parent)
    assert len(done.stdout.splitlines()) == 1 and json.loads(done.stdout)
    assert "Traceback" not in done.stderr and "Broken" not in done.stderr, done.stderr


def test_google_s_fine_tuned_files_name_imagenet_s_classes(ask, tiny_config, image_folder, tmp_path, monkeypatch):
    """As `exchange.read_metadata` tells them; a real file of that layout is too large to be written here."""
    from models.published import imagenet_classes
    save_npz(randomise(VisionTransformer(tiny_config, 16, 1000)), tmp_path / "a.npz")
    monkeypatch.setattr(exchange, "read_metadata", lambda path: {"classes": imagenet_classes()})
    line, = lines_of(ask(tmp_path / "a.npz", image_folder / "test" / "red" / "0.png", "--format", "jsonl")[0])
    assert line["label"] == imagenet_classes()[line["top"][0]["index"]] and len(line["top"]) == 5


# Attention


def test_each_image_gets_a_picture_of_where_the_model_looks(run, image_folder, ask, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = image_folder / "test"
    Image.new("RGB", (40, 20)).save(folder / "wide.png")
    files = [folder / "red" / "0.png", folder / "blue" / "0.png", folder / "wide.png", folder / "red" / "0.png"]
    told = []
    real = predict.figure
    monkeypatch.setattr(predict, "figure", lambda panels, title: told.append(title) or real(panels, title))
    out, told_in_log = ask(run, *files, "--attention", "--format", "jsonl")
    assert sorted(path.name for path in (tmp_path / "attention").iterdir()) == ["0-2.png", "0.png", "wide.png"]
    for path in (tmp_path / "attention").iterdir():
        with Image.open(path) as picture:
            assert min(picture.size) > 200
    tops = [line["top"][0] for line in lines_of(out)]
    assert told == [f"{file.name}: {top['class']}, {100 * top['probability']:.1f} %"
                    for file, top in zip(files[:3], tops)]
    assert "attention: " in told_in_log and str(Path("attention") / "0-2.png") in told_in_log
    before = (tmp_path / "attention" / "0.png").read_bytes()
    out, err = ask(run, files[0], "--attention", code=2)
    assert "attention/0.png: there already. --overwrite replaces pictures." in err.replace(os.sep, "/") and not out
    ask(run, files[1], "--attention", "--overwrite")
    assert (tmp_path / "attention" / "0.png").read_bytes() != before


def test_no_two_images_share_a_picture():
    files = ["a/x.jpg", "a/x-2.jpg", "b/x.jpg", "b/x-2.jpg", "a/x.jpg"]
    assert [path.name for path in predict.picture_files(None, files, False).values()] == [
        "x.png", "x-2.png", "x-3.png", "x-2-2.png"]


@pytest.mark.parametrize("name", ["a$x_{$.png", "price $5 to $10.png", "Größe.png", os.fsdecode(b"caf\xe9.png")],
                         ids=["broken formula", "formula", "letters", "no UTF-8"])
def test_pictures_of_files_with_odd_names(run, image_folder, ask, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    shutil.copy(image_folder / "test" / "red" / "1.png", name)
    ask(run, name, "--attention", "--output", "a.csv")
    assert (tmp_path / "attention" / name).stat().st_size > 1000


def test_a_folder_that_cannot_be_made_is_said_before_any_work(run, image_folder, ask, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("attention").write_text("a file")
    out, err = ask(run, image_folder / "test" / "red" / "1.png", "--attention", code=2)
    assert not out and "The pictures would go to attention, which cannot be made" in err


def test_pictures_lie_beside_the_output_and_a_broken_image_has_none(run, image_folder, ask, tmp_path):
    (tmp_path / "there").mkdir()
    broken = image_folder / "test" / "broken.png"
    broken.write_bytes(b"no image")
    ask(run, broken, image_folder / "test" / "red" / "1.png", "--attention", "--output", tmp_path / "there" / "a.csv",
        code=1)
    assert [path.name for path in (tmp_path / "there" / "attention").iterdir()] == ["1.png"]
    ask(run, broken, "--attention", "--output", tmp_path / "there" / "b.csv", code=1)
    assert len(list((tmp_path / "there").iterdir())) == 3
