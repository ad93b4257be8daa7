import json
from types import SimpleNamespace

import pytest
import torch

from models import onnx_export
from models.configs import replace
from models.modeling import VisionTransformer
from models.onnx_export import check, export
from tests.conftest import randomise
from tests.test_exchange import images


@pytest.fixture
def libraries():
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name, reason=f"{name} is not installed")


def differ(model, path, batch):
    x = images(model, batch)
    with torch.no_grad():
        expected = model.float()(x)
    return (torch.from_numpy(check(path, x)) - expected).abs().max().item()


@pytest.fixture
def small(tiny_config):
    return replace(tiny_config, num_layers=1)  # exporting takes seconds, most of them for the blocks


@pytest.mark.parametrize("kind", ["plain", "gap, pre_logits, one channel", "hybrid"])
def test_onnxruntime_computes_the_same_logits_for_any_batch(libraries, small, tmp_path, kind):
    changes, size, classes = {
        "plain": ({}, 16, 5),
        "gap, pre_logits, one channel": ({"classifier": "gap", "representation_size": 20, "gelu": "erf", "in_chans": 1,
                                          "mean": (0.5,), "std": (0.5,)}, (16, 24), 5),
        "hybrid": ({"patch_size": (1, 1), "resnet": {"num_layers": (1, 1), "width_factor": 0.5}}, 33, 0)}[kind]
    model = randomise(VisionTransformer(replace(small, **changes), size, classes))
    export(model, tmp_path / "a.onnx", {})
    assert differ(model, tmp_path / "a.onnx", 1) < 1e-5 and differ(model, tmp_path / "a.onnx", 3) < 1e-5
    assert [path.name for path in tmp_path.iterdir()] == ["a.onnx"]


def test_a_file_carries_the_record_names_its_ends_and_is_float32_without_dropout(libraries, small, tmp_path):
    import onnxruntime
    model = randomise(VisionTransformer(replace(small, dropout_rate=0.5), 16, 5)).double().train()
    export(model, tmp_path / "a.onnx", {"classes": list("abcde")})
    assert model.training and model.head.weight.dtype == torch.float64
    session = onnxruntime.InferenceSession(tmp_path / "a.onnx", providers=["CPUExecutionProvider"])
    (images,), (logits,) = session.get_inputs(), session.get_outputs()
    assert (images.name, images.type, images.shape[1:]) == ("images", "tensor(float)", [3, 16, 16])
    assert (logits.name, logits.type, logits.shape[1:]) == ("logits", "tensor(float)", [5])
    assert isinstance(images.shape[0], str) and images.shape[0] == logits.shape[0]
    record = json.loads(session.get_modelmeta().custom_metadata_map["vit"])
    assert record["classes"] == list("abcde") and record["config"]["mean"] == [0.5, 0.5, 0.5]
    assert record["img_size"] == [16, 16] and record["num_classes"] == 5
    assert differ(model.eval(), tmp_path / "a.onnx", 2) < 1e-5


def test_weights_beyond_what_one_file_holds_lie_beside_it_and_that_is_said(libraries, small, tmp_path, monkeypatch,
                                                                           caplog):
    model = randomise(VisionTransformer(small, 16, 5))
    monkeypatch.setattr(onnx_export, "LIMIT", 1000)
    with caplog.at_level("INFO"):
        export(model, tmp_path / "a.onnx", {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.onnx", "a.onnx.data"]
    assert "the weights are in a.onnx.data beside it" in caplog.text
    assert differ(model, tmp_path / "a.onnx", 2) < 1e-5


def test_an_unfinished_export_leaves_the_old_file_and_no_other(libraries, tiny_model, tmp_path, monkeypatch):
    (tmp_path / "a.onnx").write_bytes(b"old")

    class Program:
        model = SimpleNamespace(metadata_props={})

        def save(self, path, external_data):
            path.write_bytes(b"half")
            raise OSError("No space left on device")
    monkeypatch.setattr(torch.export, "export", lambda *_, **__: None)
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: Program())
    with pytest.raises(OSError, match="No space left"):
        export(tiny_model, tmp_path / "a.onnx", {})
    assert (tmp_path / "a.onnx").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("name", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_library_is_one_sentence(tiny_model, tmp_path, monkeypatch, name):
    def absent(wanted):
        if wanted == name:
            raise ImportError(f"No module named '{name}'")
    monkeypatch.setattr(onnx_export.importlib, "import_module", absent)
    with pytest.raises(ValueError, match=f"An .onnx file needs {name}, which is not installed: pip install onnx"):
        check("a.onnx", None) if name == "onnxruntime" else export(tiny_model, tmp_path / "a.onnx", {})
    assert not list(tmp_path.iterdir())
