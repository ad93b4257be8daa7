import json
import os
import re
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import convert
import train
from models import exchange, huggingface, onnx_export
from models.configs import CONFIGS, replace
from models.modeling import VisionTransformer
from models.npz import load_npz, save_npz
from models.published import imagenet_classes
from tests.conftest import randomise
from tests.damaged import CASES
from tests.layouts import arrays_of


def same_arrays(a, b):
    a, b = arrays_of(a), arrays_of(b)
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and a[k].tobytes() == b[k].tobytes() for k in a)


@pytest.fixture
def run(capsys):
    """Runs convert.py and returns what it printed."""
    def run(*args):
        convert.main([str(arg) for arg in args])
        return capsys.readouterr().out
    return run


def refused(capsys, command, *args):
    """Runs it and returns its one sentence: exit code 2, a line on stderr, no traceback."""
    with pytest.raises(SystemExit) as stop:
        command([str(arg) for arg in args])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith("error: ") and "Traceback" not in err
    return err[len("error: "):].strip()


@pytest.fixture
def file(tiny_model, tmp_path):
    save_npz(tiny_model, tmp_path / "tiny.npz")
    return tmp_path / "tiny.npz"


# Fine-tuning replaces the head unread.
OF_THE_HEAD = ("infinity", "transposed head", "head of two sizes", "a bit flipped in the last array",
               "missing kernel of the head", "missing bias of the head", "scalar bias")


# --- Damaged inputs --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("case", CASES)
def test_a_damaged_input_is_one_sentence_and_nothing_is_written(case, tiny_model, tmp_path, capsys):
    save_npz(tiny_model, tmp_path / "good.npz")
    path = CASES[case](tmp_path, arrays_of(tmp_path / "good.npz"))
    (tmp_path / "out.npz").write_bytes(b"precious")
    said = refused(capsys, convert.main, path, tmp_path / "out.npz", "--overwrite")
    assert path.name in said and "\n" not in said and 30 < len(said.replace(str(tmp_path), "")) < 400, said
    assert (tmp_path / "out.npz").read_bytes() == b"precious"
    assert not list(tmp_path.glob("*.part*"))


@pytest.mark.parametrize("case", CASES)
def test_a_damaged_input_is_not_described_either(case, tiny_model, tmp_path, capsys):
    save_npz(tiny_model, tmp_path / "good.npz")
    said = refused(capsys, convert.main, CASES[case](tmp_path, arrays_of(tmp_path / "good.npz")))
    assert "\n" not in said and 30 < len(said.replace(str(tmp_path), "")) < 400, said


@pytest.mark.parametrize("out", [[], ["out.npz"]], ids=["described", "converted"])
def test_another_variant_than_the_one_named_is_refused(out, file, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = refused(capsys, convert.main, file, *out, "--model_type", "ViT-B_16")
    assert "holds another model, not ViT-B_16" in said and "hidden_size 32 instead of 768" in said
    assert "no model 'B_16'" in refused(capsys, convert.main, file, *out, "--model_type", "B_16")


@pytest.mark.parametrize("case", [case for case in CASES if case not in OF_THE_HEAD])
def test_training_refuses_a_damaged_input_as_well(case, tiny_model, tmp_path, capsys, image_folder):
    save_npz(tiny_model, tmp_path / "good.npz")
    path = CASES[case](tmp_path, arrays_of(tmp_path / "good.npz"))
    said = refused(capsys, train.main, "--dataset", image_folder, "--pretrained_dir", path, "--num_steps", 1,
                   "--output_dir", tmp_path / "out")
    assert "\n" not in said or case == "missing file", said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("case", OF_THE_HEAD)
def test_a_damaged_head_does_not_keep_training_from_replacing_it(case, tiny_model, tmp_path, image_folder):
    save_npz(tiny_model, tmp_path / "good.npz")
    path = CASES[case](tmp_path, arrays_of(tmp_path / "good.npz"))
    result = train.main([str(word) for word in ("--dataset", image_folder, "--pretrained_dir", path, "--num_steps", 1,
                                                "--train_batch_size", 4, "--output_dir", tmp_path / "out")])
    assert result["last"].loss == pytest.approx(np.log(3), abs=1e-5)  # a zero head, and the first rate is zero


def test_there_are_at_least_fifty_damaged_inputs():
    assert len(CASES) >= 50


# --- What a file is --------------------------------------------------------------------------------------------------

def test_an_npz_is_described_in_a_few_lines(tiny_config, tmp_path, run):
    model = randomise(VisionTransformer(replace(tiny_config, representation_size=20), 16, 5))
    torch.nn.init.zeros_(model.head.weight)
    torch.nn.init.zeros_(model.head.bias)
    save_npz(model, tmp_path / "tiny.npz", dtype="float16")
    said = run(tmp_path / "tiny.npz")
    for text in ("Google's .npz", "none of Google's", "custom: patch 4 x 4, width 32, 2 layers, 2 heads, MLP 64",
                 "16 x 16 px, 4 x 4 patches", "3, normalised as (x / 255 - 0.5) / 0.5",
                 "pre_logits of width 20, 5 classes on the class token, all zero", "float16; GELU tanh"):
        assert text in said
    assert f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters" in said
    assert len(said.splitlines()) <= 12


def test_our_own_file_tells_its_classes_origin_and_accuracy(tiny_model, tmp_path, run):
    exchange.save(tiny_model, tmp_path / "a.safetensors", {
        "classes": list("vwxyz"), "finetuned_from": {"name": "ViT-B_16.npz"}, "accuracy": {"test": 0.25},
        "command": "python train.py --name a"})
    said = run(tmp_path / "a.safetensors")
    assert "5: v, w, x, y, z" in said and "from ViT-B_16.npz, test accuracy 25.00%" in said
    assert "ours" in said and "python train.py --name a" in said and "zero" not in said


def test_a_published_layout_names_its_family_or_the_candidates(tmp_path, run):
    model = VisionTransformer(CONFIGS["ViT-Ti_16"], 224, 1000)
    save_npz(model, tmp_path / "a.npz")
    assert "family   nothing proves one; like files of augreg\n" in run(tmp_path / "a.npz")
    name = "Ti_16-i1k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.03-res_224.npz"
    (tmp_path / "a.npz").rename(tmp_path / name)
    said = run(tmp_path / name)
    assert "family   augreg\n" in said and "1,000: tench, goldfish" in said


# --- Conversion ------------------------------------------------------------------------------------------------------

@pytest.fixture(params=["token", "gap", "hybrid", "pre_logits", "not square", "one channel"])
def variant(request, tiny_config, tmp_path):
    changes, size = {
        "token": ({}, 16), "gap": ({"classifier": "gap"}, 16), "pre_logits": ({"representation_size": 20}, 16),
        "hybrid": ({"patch_size": (1, 1), "resnet": {"num_layers": (1, 1), "width_factor": 0.5}}, 32),
        "not square": ({}, (16, 40)), "one channel": ({"in_chans": 1, "mean": (0.5,), "std": (0.5,)}, 16),
    }[request.param]
    model = randomise(VisionTransformer(replace(tiny_config, **changes), size, 5))
    save_npz(model, tmp_path / "a.npz")
    return request.param


def test_a_round_trip_through_safetensors_is_bit_equal(variant, tmp_path, run):
    keep = ["--keep_pre_logits"] * (variant == "pre_logits")
    assert "are equal to the bit" in run(tmp_path / "a.npz", tmp_path / "b.safetensors", *keep)
    assert "are equal to the bit" in run(tmp_path / "b.safetensors", tmp_path / "c.npz")
    assert same_arrays(tmp_path / "a.npz", tmp_path / "c.npz")


def test_an_onnx_file_gives_the_same_logits(variant, tmp_path, run):
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    said = run(tmp_path / "a.npz", tmp_path / "b.onnx")
    assert float(re.search(r"\(read by onnxruntime\) differ by at most (\S+),", said)[1]) < 1e-5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "b.onnx"]


def test_a_hugging_face_folder_comes_back_bit_equal_or_is_refused(variant, tmp_path, capsys, run):
    pytest.importorskip("transformers", reason="transformers is not installed")
    if variant in ("gap", "hybrid", "pre_logits"):
        said = refused(capsys, convert.main, tmp_path / "a.npz", f"{tmp_path / 'folder'}/")
        assert "Hugging Face's ViT has no" in said or "for which Hugging Face's ViT has no place" in said
        assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]
        return
    said = run(tmp_path / "a.npz", f"{tmp_path / 'folder'}/")
    found = re.search(r"\(read by transformers\) (?:are equal to the bit|differ by at most (\S+),)", said)
    assert float(found[1] or 0) < 1e-5
    run(tmp_path / "folder", tmp_path / "c.npz")
    assert same_arrays(tmp_path / "a.npz", tmp_path / "c.npz")
    card = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert card["hidden_act"] == "gelu_pytorch_tanh" and card["layer_norm_eps"] == 1e-6


def test_dropping_pre_logits_drops_the_head_that_reads_them(tiny_config, tmp_path, capsys, run):
    save_npz(randomise(VisionTransformer(replace(tiny_config, representation_size=20), 16, 5)), tmp_path / "a.npz")
    said = refused(capsys, convert.main, tmp_path / "a.npz", tmp_path / "b.safetensors")
    assert "--drop_pre_logits" in said and "--keep_pre_logits" in said and not (tmp_path / "b.safetensors").exists()
    run(tmp_path / "a.npz", tmp_path / "b.safetensors", "--drop_pre_logits")
    assert not [name for name in load_file(tmp_path / "b.safetensors") if name.startswith(("head", "pre_logits"))]


def test_what_google_did_not_train_is_refused_as_npz(tiny_config, tmp_path, capsys):
    exchange.save(VisionTransformer(replace(tiny_config, gelu="erf"), 16, 5), tmp_path / "a.safetensors", {})
    assert "cannot carry gelu = erf" in refused(capsys, convert.main, tmp_path / "a.safetensors", tmp_path / "b.npz")
    assert not (tmp_path / "b.npz").exists()


def test_a_head_of_zeros_is_compared_by_its_features(tiny_config, tmp_path, run):
    save_npz(VisionTransformer(tiny_config, 16, 5), tmp_path / "a.npz")
    said = run(tmp_path / "a.npz", tmp_path / "b.safetensors")
    assert "Features (the head is all zero)" in said and "are equal to the bit" in said


def test_a_conversion_that_changes_the_logits_is_not_written(file, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(convert, "write", lambda model, path, kind, *_: save_npz(
        randomise(VisionTransformer(model.config, 16, 5), seed=1), path))
    (tmp_path / "b.npz").write_bytes(b"precious")
    said = refused(capsys, convert.main, file, tmp_path / "b.npz", "--overwrite")
    assert "was not written: its logits would differ" in said
    assert (tmp_path / "b.npz").read_bytes() == b"precious" and len(list(tmp_path.iterdir())) == 2


def test_nothing_is_overwritten_unasked(file, tmp_path, capsys, run):
    (tmp_path / "b.npz").write_bytes(b"precious")
    assert "exists. Choose another name" in refused(capsys, convert.main, file, tmp_path / "b.npz")
    assert "is not written here" in refused(capsys, convert.main, file, tmp_path / "b.pth")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").write_text("precious")
    assert "notes.txt" in refused(capsys, convert.main, file, f"{tmp_path}/folder/", "--overwrite")
    run(file, tmp_path / "b.npz", "--overwrite")
    assert same_arrays(file, tmp_path / "b.npz")


def test_another_size_is_resized_and_said(file, tmp_path, run):
    assert "resized from 4 x 4 to 6 x 8" in run(file, tmp_path / "b.npz", "--img_size", "24,32")
    assert load_npz(tmp_path / "b.npz").grid == (6, 8)


def test_half_precision_is_written_when_asked_for(file, tiny_model, tmp_path, capsys, run):
    run(file, tmp_path / "b.npz", "--dtype", "float16")
    run(file, tmp_path / "b.safetensors", "--dtype", "bfloat16")
    said = refused(capsys, convert.main, file, tmp_path / "c.npz", "--dtype", "bfloat16")
    assert "is not written in bfloat16" in said
    assert {array.dtype.name for array in arrays_of(tmp_path / "b.npz").values()} == {"float16"}
    assert torch.equal(load_npz(tmp_path / "b.npz").norm.weight, tiny_model.norm.weight.half().float())
    assert load_file(tmp_path / "b.safetensors")["cls_token"].dtype == torch.bfloat16


def test_imagenet_names_go_with_a_fine_tuned_file_of_googles(tmp_path, run, monkeypatch):
    name = tmp_path / "imagenet21k+imagenet2012" / "ViT-B_32.npz"
    config = replace(CONFIGS["ViT-B_32"], num_layers=1)
    monkeypatch.setitem(CONFIGS, "ViT-B_32", config)  # the name of a structure decides, and one block is enough of it
    save_npz(randomise(VisionTransformer(config, 384, 1000)), name)
    assert "1,000 classes are ImageNet's" in run(name, tmp_path / "b.safetensors")
    assert exchange.read_metadata(tmp_path / "b.safetensors")["classes"] == imagenet_classes()
    assert imagenet_classes()[207] == "golden retriever" and len(imagenet_classes()) == 1000


def test_a_large_onnx_keeps_the_name_of_its_weights(file, tmp_path, run, monkeypatch):
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    monkeypatch.setattr(onnx_export, "LIMIT", 0)  # 2 GiB is the true one
    run(file, tmp_path / "b.onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.onnx", "b.onnx.data", "tiny.npz"]
    images = torch.rand(3, 3, 16, 16)
    ours = load_npz(file).eval()(images).detach().numpy()
    assert np.abs(onnx_export.check(tmp_path / "b.onnx", images.numpy()) - ours).max() < 1e-5


def test_values_beyond_the_type_are_refused_before_anything_is_made(tiny_model, tmp_path, capsys):
    with torch.no_grad():
        tiny_model.head.weight *= 1e6
    save_npz(tiny_model, tmp_path / "a.npz")
    for out in ("b.npz", "b.safetensors", "b/"):
        said = refused(capsys, convert.main, tmp_path / "a.npz", f"{tmp_path}/{out}", "--dtype", "float16")
        assert "is beyond what float16 can hold" in said
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]


def test_a_model_folder_is_back_when_its_successor_cannot_take_its_place(file, tmp_path, capsys, run, monkeypatch):
    run(file, f"{tmp_path}/model/")
    before = (tmp_path / "model" / "model.safetensors").read_bytes()
    rename, calls = os.rename, []

    def second_fails(old, new):
        calls.append(new)
        if str(new) == f"{tmp_path}/model" and len(calls) > 1 and "part" in str(old):
            raise OSError(5, "Input/output error")
        rename(old, new)
    monkeypatch.setattr(huggingface.os, "rename", second_fails)
    refused(capsys, convert.main, file, f"{tmp_path}/model/", "--overwrite")
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "tiny.npz"]


def test_a_place_that_cannot_be_written_is_one_sentence(file, tmp_path, capsys):
    assert "cannot be written" in refused(capsys, convert.main, file, file / "x.npz")
    assert "cannot be written" in refused(capsys, convert.main, file, "/proc/x.npz")


def test_a_refused_conversion_makes_no_folders(tiny_config, tmp_path, capsys):
    save_npz(VisionTransformer(replace(tiny_config, classifier="gap"), 16, 5), tmp_path / "a.npz")
    refused(capsys, convert.main, tmp_path / "a.npz", f"{tmp_path}/new/folder/")
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]


def test_float64_is_rounded_and_said(tiny_model, tmp_path, run):
    save_npz(tiny_model.double(), tmp_path / "a.npz")
    assert "float32 (float64 in a.npz)" in run(tmp_path / "a.npz", tmp_path / "b.npz")


def test_the_type_of_the_file_is_kept_where_the_format_has_it(tiny_model, tmp_path, run):
    save_npz(tiny_model, tmp_path / "a.npz", dtype="float16")
    run(tmp_path / "a.npz", tmp_path / "b.safetensors")
    run(tmp_path / "b.safetensors", tmp_path / "c.npz")
    assert same_arrays(tmp_path / "a.npz", tmp_path / "c.npz")
    exchange.save(tiny_model, tmp_path / "d.safetensors", {}, dtype=torch.bfloat16)
    assert "float32 (bfloat16 in d.safetensors)" in run(tmp_path / "d.safetensors", tmp_path / "e.npz")


def test_pixels_that_fill_no_patch_are_compared_and_said_to_be_lost(tiny_config, tmp_path, run):
    exchange.save(randomise(VisionTransformer(tiny_config, 18, 5)), tmp_path / "a.safetensors", {})
    said = run(tmp_path / "a.safetensors", tmp_path / "b.npz")
    assert "records the grid and not 18 x 18 px: it will be read as for 16 x 16" in said
    assert "are equal to the bit" in said


@pytest.mark.parametrize("library", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_library_for_onnx_is_one_sentence(library, file, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    said = refused(capsys, convert.main, file, tmp_path / "b.onnx")
    assert f"needs {library}, which is not installed: pip install onnx onnxscript onnxruntime" in said
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.npz"]
