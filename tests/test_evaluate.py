"""evaluate.py as a user starts it, on a run's folder and on files of weights that the tests write."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import evaluate
import train
from models import exchange
from models.modeling import VisionTransformer
from models.npz import save_npz
from models.published import imagenet_classes
from tests.conftest import randomise
from utils import data
from utils.images import decode_all

CLASSES = ["blue", "green", "red"]


@pytest.fixture
def model(tiny_config, image_folder):
    """Three classes, some of the images right and some wrong."""
    model = randomise(VisionTransformer(tiny_config, 16, 3))
    images, labels = pixels(image_folder), torch.arange(12) // 4
    with torch.no_grad():
        model.head.bias -= model(images).mean(dim=0)  # else every image would be of one class
        for _ in range(3):
            if 0 < (model(images).argmax(dim=1) == labels).sum() < 12:
                return model
            for p in model.head.parameters():
                p.copy_(p.roll(1, dims=0))
    raise AssertionError("no such model")


def pixels(folder):
    return (torch.stack(decode_all(data.load(str(folder)).test.images)) - 127.5) / 127.5


@pytest.fixture
def run(model, image_folder, tmp_path):
    """The folder of a run on `image_folder`, as train.py leaves it."""
    folder = tmp_path / "output" / "run"
    folder.mkdir(parents=True)
    settings = {"dataset": str(image_folder), "data_dir": "data", "labels": None, "val_fraction": 0.0, "seed": 42}
    (folder / "settings.json").write_text(json.dumps(settings))
    exchange.save(model, folder / "last.safetensors", {"classes": CLASSES, "settings": settings})
    return folder


@pytest.fixture
def score(tmp_path, capsys):
    """score(flags ...) -> (the report as JSON, what was printed, what was logged)."""
    def score(*argv, code=0):
        output = tmp_path / "report.json"
        output.unlink(missing_ok=True)
        words = [str(word) for word in (*argv, "--output", output, "--device", "cpu")]
        if code:
            with pytest.raises(SystemExit) as stop:
                evaluate.main(words)
            assert stop.value.code == code
        else:
            evaluate.main(words)
        return json.loads(output.read_text()), *capsys.readouterr()
    return score


def refused(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        evaluate.main([str(word) for word in argv])
    out, err = capsys.readouterr()
    said = [line for line in err.strip().splitlines() if line.startswith("error: ")]
    assert stop.value.code == 2 and out == "" and len(said) == 1 and err.strip().endswith(said[0]), err
    return said[0]


# --- Numbers ---------------------------------------------------------------------------------------------------------

def test_a_run_needs_no_flag_and_its_numbers_are_those_of_the_logits(score, run, model, image_folder):
    found, out, err = score(run)
    with torch.no_grad():
        logits = model(pixels(image_folder))
    labels = data.load(str(image_folder)).test.labels
    right = (logits.argmax(1) == labels).double().mean().item()
    assert 0 < right < 1 and found["top1"] == pytest.approx(right) and found["images"] == 12 and found["skipped"] == []
    assert found["loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert sum(n for _, _, n in found["confusion"]) == 12 and found["images_per_second"] > 0 and found["top5"] is None
    assert "last.safetensors" in out and f"{100 * right:.2f} %" in out and "images, test (test/): 12 images" in out
    assert all(name in out for name in CLASSES) and "confusion: a row is what" in out and "is written" in err


def test_the_run_s_own_accuracy_comes_back(score, image_folder, tiny_model, tmp_path):
    save_npz(tiny_model, tmp_path / "tiny.npz")
    result = train.main([str(word) for word in (
        "--dataset", image_folder, "--pretrained_dir", tmp_path / "tiny.npz", "--img_size", 16, "--num_steps", 6,
        "--warmup_steps", 1, "--train_batch_size", 12, "--output_dir", tmp_path / "output", "--device", "cpu",
        "--val_fraction", 0.25, "--eval_every", 2)])
    for kind in ("best", "last"):
        found, _, _ = score(result["folder"], "--weights", kind)
        assert found["top1"] == result[kind].accuracy and found["loss"] == result[kind].loss
        assert found["macro_f1"] == pytest.approx(result[kind].macro_f1)
    found, out, _ = score(result["folder"], "--split", "val")
    assert "best.safetensors" in out and found["images"] == 9  # a held-out part has chosen it
    assert score(result["folder"], "--split", "train")[0]["images"] == 27
    assert score(result["folder"], "--split", "all")[0]["images"] == 48
    file = shutil.copy(result["folder"] / "last.safetensors", tmp_path / "alone.safetensors")
    assert score(file, "--dataset", image_folder, "--split", "val")[0]["images"] == 9  # drawn as the header says


def test_rows_of_the_csv_are_the_report_image_by_image(score, run, tmp_path):
    found, _, _ = score(run)
    evaluate.main([str(run), "--output", str(tmp_path / "rows.csv"), "--batch_size", "5"])
    with open(tmp_path / "rows.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12 and list(rows[0]) == ["image", "label", "predicted", "confidence"]
    assert sum(row["label"] == row["predicted"] for row in rows) / 12 == found["top1"]
    assert all(f"/test/{row['label']}/" in row["image"] and 1/3 <= float(row["confidence"]) <= 1 for row in rows)


def test_images_in_memory_are_numbered(tiny_config, tmp_path, score):
    model = randomise(VisionTransformer(tiny_config, 16, 10))
    exchange.save(model, tmp_path / "a.safetensors", {"classes": list(map(str, range(10)))})
    found, out, _ = score(tmp_path / "a.safetensors", "--dataset", "digits")
    assert found["images"] == 359 and "a fixed 20 % of digits" in out
    evaluate.main([str(tmp_path / "a.safetensors"), "--dataset", "digits", "--output", str(tmp_path / "rows.csv")])
    assert (tmp_path / "rows.csv").read_text().splitlines()[359].startswith("358,")


# --- Classes ---------------------------------------------------------------------------------------------------------

def with_head(model, order, config=None):
    """The same model with its classes in another order; -1 is a class that is never predicted."""
    other = VisionTransformer(model.config, 16, len(order)).eval()
    state = model.state_dict()
    weight, bias = (torch.cat([state[f"head.{name}"], torch.full_like(state[f"head.{name}"][:1], fill)])[order]
                    for name, fill in (("weight", 0), ("bias", -1e4)))
    other.load_state_dict({**state, "head.weight": weight, "head.bias": bias})
    return other


def by_name(found):
    names = [row["name"] for row in found["classes"]]
    return {(names[label], names[predicted]): n for label, predicted, n in found["confusion"]}


def test_classes_are_matched_by_name(score, run, model, image_folder, tmp_path):
    expected, _, _ = score(run)
    order = [2, -1, 0, 1]
    exchange.save(with_head(model, order), tmp_path / "a.safetensors", {"classes": ["red", "grey", "blue", "green"]})
    found, out, err = score(tmp_path / "a.safetensors", "--dataset", image_folder)
    assert found["top1"] == expected["top1"] and by_name(found) == by_name(expected)
    assert found["macro_f1"] == pytest.approx(expected["macro_f1"]) and "grey" not in out
    assert "3 of the model's 4 classes" in err
    exchange.save(with_head(model, [2, 0, 1]), tmp_path / "b.safetensors", {"classes": ["red", "blue", "green"]})
    found, _, err = score(tmp_path / "b.safetensors", "--dataset", image_folder)
    assert by_name(found) == by_name(expected) and "the same classes in another order" in err


def test_a_file_without_names_is_matched_by_order(score, run, model, image_folder, tmp_path):
    save_npz(model, tmp_path / "a.npz")
    found, _, err = score(tmp_path / "a.npz", "--dataset", image_folder)
    assert found["top1"] == score(run)[0]["top1"] and "does not name its classes" in err


@pytest.fixture(scope="module")
def imagenet_folder(tmp_path_factory):
    """1,000 folders of WordNet ids with an image each; val/ has two of them with ImageNet's file names."""
    root = tmp_path_factory.mktemp("imagenet")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8))
    for i in range(1000):
        folder = root / "train" / f"n{i:08d}"
        folder.mkdir(parents=True)
        image.save(folder / "a.png")
    for i in (3, 7):
        folder = root / "val" / f"n{i:08d}"
        folder.mkdir(parents=True)
        for number in (i, i + 1):
            Image.effect_noise((4, 4), 100).save(folder / f"ILSVRC2012_val_{number:08d}.png")
    return root


@pytest.fixture
def imagenet_model(tiny_config, tmp_path):
    """A head like Google's, that predicts class 7 for whatever it sees."""
    model = randomise(VisionTransformer(tiny_config, 16, 1000))
    with torch.no_grad():
        model.head.bias[7] += 1e3
    exchange.save(model, tmp_path / "imagenet.safetensors", {"classes": imagenet_classes()})
    return tmp_path / "imagenet.safetensors"


def test_word_net_ids_are_matched_with_imagenet_s_names_by_their_order(score, imagenet_model, imagenet_folder):
    found, out, err = score(imagenet_model, "--dataset", imagenet_folder)
    assert found["top1"] == 0.5 and "WordNet ids: classes are matched by their sorted order" in err
    assert {label for label, _, _ in found["confusion"]} == {3, 7} and "cock" in out
    assert "998 classes have no image here" in out


def test_real_labels(score, imagenet_model, imagenet_folder, tmp_path, capsys):
    """Images 3, 4, 7 and 8 of the validation part, all predicted as class 7; image n is entry n - 1."""
    table = [[] for _ in range(8)]
    table[3 - 1], table[7 - 1], table[8 - 1] = [3, 7], [6], [7]
    (tmp_path / "real.json").write_text(json.dumps(table))
    real = ("--dataset", imagenet_folder, "--real_labels", tmp_path / "real.json")
    found, out, _ = score(imagenet_model, *real)
    assert found["real_images"] == 3 and found["real_accuracy"] == pytest.approx(2 / 3) and "ReaL" in out
    for content, words in (("[[1], 3]", "no JSON list of lists"), ("{", "no JSON"), ("[[1000]]", "0 to 999"),
                           ("[[1]]", "labels for 1 images")):
        (tmp_path / "real.json").write_text(content)
        assert words in refused(capsys, imagenet_model, *real)
    assert "found " in refused(capsys, imagenet_model, *real, "--split", "train")


# --- Several labels --------------------------------------------------------------------------------------------------

@pytest.fixture
def several(run, model, image_folder):
    """A run with several labels an image, and its table."""
    rows = ["image,label,split"]
    for part in ("train", "test"):
        for name, labels in (("blue", "blue|red"), ("green", "green"), ("red", "red")):
            rows += [f"{part}/{name}/{i}.png,{labels},{part}" for i in range(4)]
    (image_folder / "labels.csv").write_text("\n".join(rows))
    settings = {**json.loads((run / "settings.json").read_text()), "labels": str(image_folder / "labels.csv")}
    (run / "settings.json").write_text(json.dumps(settings))
    exchange.save(model, run / "last.safetensors", {"classes": CLASSES, "multi_label": True, "settings": settings})
    return run


def test_several_labels_an_image(score, several, model, image_folder, tmp_path):
    found, out, _ = score(several)
    with torch.no_grad():
        logits = model(pixels(image_folder))
    truth = torch.tensor([[1, 0, 1]] * 4 + [[0, 1, 0]] * 4 + [[0, 0, 1]] * 4)
    assert found["all_labels_right"] == pytest.approx(((logits > 0) == truth).all(1).double().mean().item())
    assert found["loss"] == pytest.approx(
        F.binary_cross_entropy_with_logits(logits, truth.float(), reduction="none").sum(1).mean().item(), rel=1e-5)
    assert "mean average precision" in out and "confusion" not in out
    assert [row["images"] for row in found["classes"]] == [4, 4, 8]
    evaluate.main([str(several), "--output", str(tmp_path / "rows.csv")])
    rows = (tmp_path / "rows.csv").read_text().splitlines()
    assert rows[0] == "image,label,predicted" and rows[1].split(",")[1] == "blue|red"


# --- Broken and bad input --------------------------------------------------------------------------------------------

def test_a_broken_image_is_skipped_said_and_counted(score, run, image_folder):
    (image_folder / "test" / "red" / "3.png").write_bytes(b"")
    found, out, err = score(run, code=1)
    assert found["images"] == 11 and [path[-9:] for path in found["skipped"]] == ["red/3.png"]
    assert err.count("3.png cannot be read as an image") == 1 and "1 of 12 images could not be read" in err
    assert "11 images" in out


def test_a_set_of_broken_images_is_an_error(run, image_folder, capsys):
    for path in (image_folder / "test").rglob("*.png"):
        path.write_bytes(b"")
    assert "None of the 12 images could be read" in refused(capsys, run)


def test_paths_in_a_file_s_header_are_never_followed(run, tmp_path, capsys):
    file = shutil.copy(run / "last.safetensors", tmp_path / "alone.safetensors")  # its header names the folder
    assert "say which, with --dataset." in refused(capsys, file)
    assert f"or give the folder of its run, {run}" in refused(capsys, run / "last.safetensors")


def test_data_that_moved_is_asked_for(run, image_folder, score, capsys):
    image_folder.rename(image_folder.with_name("moved"))
    assert f"was trained on {image_folder}, which is not there" in refused(capsys, run)
    assert score(run, "--dataset", image_folder.with_name("moved"))[0]["images"] == 12


@pytest.mark.parametrize("argv, words", [
    (["RUN", "--output", "a.txt"], ".json takes the whole report"), (["RUN", "--output", "."], "is a folder"),
    (["RUN", "--output", "no/where.json"], "there is no folder no"), (["RUN", "--output", "precious.json"], "exists"),
    (["nowhere"], "no checkpoint and no run at nowhere"), (["RUN", "--split", "val"], "has no part held out"),
    (["RUN", "--weights", "best"], "without best.safetensors"), (["RUN", "--dataset", "cifar1"], "neither a named set"),
    (["FILE", "--weights", "best", "--dataset", "IMAGES"], "is no run's folder"), (["IMAGES"], ""),
    (["RUN", "--model_type", "ViT-B_16"], "not ViT-B_16"), (["RUN", "--img_size", "2"], "smaller than one patch"),
    (["RUN", "--batch_size", "0"], "'0' is no whole number"), (["RUN", "--num_workers", "-2"], "'-2' is no number"),
    (["RUN", "--real_labels", "no.json"], "for ImageNet's 1,000 classes"), (["RUN", "--spilt", "val"], "--split"),
    (["RUN", "--dataset", "digits"], "classes that the model lacks: 0, 1, 2, 3, 4 and 5 more"), ([], "CHECKPOINT"),
    (["RUN", "--labels", "no.csv", "--dataset", "IMAGES"], "no.csv")])
def test_bad_input_is_one_sentence_and_writes_nothing(argv, words, run, image_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "precious.json").write_bytes(b"precious")
    before = sorted(tmp_path.rglob("*"))
    places = {"RUN": run, "FILE": run / "last.safetensors", "IMAGES": image_folder}
    said = refused(capsys, *[places.get(word, word) for word in argv])
    assert words in said and len(said.replace(str(tmp_path), "")) < 400
    assert sorted(tmp_path.rglob("*")) == before and (tmp_path / "precious.json").read_bytes() == b"precious"


@pytest.mark.parametrize("change, words", [
    (lambda about: about["classes"].pop(), "names 2 classes, and its head has 3"),
    (lambda about: about.update(multi_label=True), "several classes an image, and the labels of images give one"),
    (lambda about: about.update(classes=["a", "b", "red"]), "lacks: blue, green. The model's are a, b, red"),
    (lambda about: about.update(classes=["a", "red", "red"]), "gives one name to two classes")])
def test_a_header_that_does_not_fit_is_refused(change, words, run, model, capsys):
    about = {"classes": list(CLASSES)}
    change(about)
    exchange.save(model, run / "last.safetensors", about)
    assert words in refused(capsys, run)


def test_weights_without_a_use_are_refused(run, tiny_config, tmp_path, image_folder, capsys, model):
    for classes, words in ((3, "a head of zeros"), (0, "no head")):
        exchange.save(VisionTransformer(tiny_config, 16, classes), tmp_path / "a.safetensors", {})
        said = refused(capsys, tmp_path / "a.safetensors", "--dataset", image_folder)
        assert f"{words}: it is for fine-tuning only" in said
    model.norm.weight.data[:] = 3e38  # finite, and beyond what float32 can multiply
    exchange.save(model, run / "last.safetensors", {"classes": CLASSES})
    assert "not finite" in refused(capsys, run)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"dataset": 3}', "\xff"])
def test_damaged_settings_are_refused(text, run, capsys):
    (run / "settings.json").write_text(text, encoding="latin-1")
    assert "settings.json is damaged" in refused(capsys, run)


def test_overwriting_is_asked_for_and_an_error_leaves_the_old_report(run, tmp_path, image_folder, capsys):
    (tmp_path / "a.json").write_text("precious")
    refused(capsys, run, "--output", tmp_path / "a.json", "--overwrite", "--dataset", "digits")
    assert (tmp_path / "a.json").read_text() == "precious"
    evaluate.main([str(run), "--output", str(tmp_path / "a.json"), "--overwrite"])
    assert json.loads((tmp_path / "a.json").read_text())["images"] == 12


def test_debug_shows_the_traceback(run):
    with pytest.raises(ValueError, match="lacks"):
        evaluate.main([str(run), "--dataset", "digits", "--debug"])


def test_an_interrupt_ends_with_130(run, monkeypatch, capsys):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt
    monkeypatch.setattr(evaluate, "ask", interrupt)
    with pytest.raises(SystemExit) as stop:
        evaluate.main([str(run)])
    assert stop.value.code == 130 and "Interrupted" in capsys.readouterr().err


def test_many_classes_are_shown_by_the_worst():
    from utils.tables import as_text
    rows = [{"name": f"class{i}", "precision": 1.0, "recall": i / 100, "f1": i / 100, "images": 2, "predicted": 1,
             "in_data": True} for i in range(50)]
    text = as_text({"model": "m", "data": "d", "images": 100, "images_per_second": 3.0, "device": "cpu", "top1": 0.5,
                    "top5": 0.75, "loss": 1.0, "macro_f1": 0.4, "balanced_accuracy": 0.5, "calibration_error": 0.1,
                    "classes": rows, "confusion": [[0, 1, 1], [3, 2, 2], [4, 4, 2]]})
    assert "the 10 worst of 50 classes" in text and "class9 " in text and "class10" not in text
    lines = text.splitlines()
    assert lines[-2:] == ["class3  taken for class2: 2 of 2", "class0  taken for class1: 1 of 2"]
