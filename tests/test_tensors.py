import argparse
import json
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from models import tensors
from models.exchange import load, save
from models.npz import save_npz
from models.tensors import SafeTensors, TorchFile, kind_of, open_file


@pytest.fixture
def state(tiny_model):
    return tiny_model.state_dict()


def same(state, file):
    with file:
        return state.keys() == file.shapes.keys() and all(np.array_equal(value.numpy(), file.read(name))
                                                          for name, value in state.items())


# --- Kinds -----------------------------------------------------------------------------------------------------------

def test_the_kind_of_a_file_is_told_by_its_content(tiny_model, state, tmp_path):
    save_npz(tiny_model, tmp_path / "npz.bin")
    save_file(state, tmp_path / "safetensors.npz")
    torch.save(state, tmp_path / "torch.safetensors")
    torch.save(state, tmp_path / "old", _use_new_zipfile_serialization=False)
    kinds = {path.name: kind_of(path) for path in tmp_path.iterdir()}
    assert kinds == {"npz.bin": "npz", "safetensors.npz": "safetensors", "torch.safetensors": "torch", "old": "torch"}
    for name in ("safetensors.npz", "torch.safetensors", "old"):
        assert same(state, open_file(tmp_path / name))
    assert kind_of(tmp_path) == "folder"


@pytest.mark.parametrize("name, kind", [("a.npz", "npz"), ("a.safetensors", "safetensors"), ("a.pth", "torch"),
                                        ("a.pth.tar", "torch"), ("pytorch_model.bin", "torch"), ("a.ckpt", "torch")])
def test_a_damaged_file_is_taken_for_what_its_name_says(tmp_path, name, kind):
    (tmp_path / name).write_text("404: Not Found")
    assert kind_of(tmp_path / name) == kind


def test_other_endings_and_missing_files_are_refused(tmp_path):
    (tmp_path / "a.onnx").write_text("a graph")
    with pytest.raises(ValueError, match=r"weights are read from .npz, .safetensors and .*folders, not from '.onnx'"):
        kind_of(tmp_path / "a.onnx")
    with pytest.raises(FileNotFoundError, match=r"There is no checkpoint at .*none.pth"):
        kind_of(tmp_path / "none.pth")


# --- .safetensors ----------------------------------------------------------------------------------------------------

def test_a_safetensors_reads_as_written_in_the_files_order(state, tmp_path):
    dtypes = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
    state = {name: value.to(dtypes[i % 4]) for i, (name, value) in enumerate(state.items())}
    save_file({**state, "empty": torch.zeros(0, 3)}, tmp_path / "a.safetensors")
    with SafeTensors(tmp_path / "a.safetensors") as file:
        order = [entry["data_offsets"][0] for entry in file._entries.values()]
        assert order == sorted(order) and file.shapes["empty"] == (0, 3) and file.read("empty").shape == (0, 3)
        for name, value in state.items():
            assert file.dtypes[name] == str(value.dtype).removeprefix("torch.") and file.shapes[name] == value.shape
            assert np.array_equal(file.read(name), value.float() if value.dtype == torch.bfloat16 else value)


def test_a_safetensors_maps_no_page_of_the_file_into_memory(tmp_path):
    save_file({"a": torch.ones(4_000_000)}, tmp_path / "a.safetensors")  # 16 MB
    with SafeTensors(tmp_path / "a.safetensors") as file:
        assert file.read("a").sum() == 4_000_000
        with open("/proc/self/maps", encoding="utf-8") as maps:
            assert str(tmp_path / "a.safetensors") not in maps.read()


@pytest.mark.parametrize("header, message", [
    ("{not", "entry 'vit' of its header is not a JSON object"), ("[1]", "is not a JSON object"),
    ('{"config": 3}', "written by another version of this toolkit"),
    ('{"config": {"depth": 3}}', r"another version of this toolkit: a model configuration has no field \['depth'\]"),
])
def test_a_record_that_is_none_of_ours_is_refused(state, tmp_path, header, message):
    save_file(state, tmp_path / "a.safetensors", metadata={"vit": header})
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "a.safetensors")


def test_cut_off_safetensors_are_refused(state, tmp_path):
    save_file(state, tmp_path / "a.safetensors")
    content = (tmp_path / "a.safetensors").read_bytes()
    for length in (0, 7, 100, len(content) - 10):
        (tmp_path / "a.safetensors").write_bytes(content[:length])
        with pytest.raises(ValueError, match="is not a complete .safetensors file.*Fetch or copy it again"):
            SafeTensors(tmp_path / "a.safetensors")


def test_an_unfinished_save_leaves_the_old_file_and_no_other(tiny_model, tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    save(tiny_model, path, {})
    before = path.read_bytes()

    def full_disk(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("No space left on device")
    monkeypatch.setattr(tensors, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save(tiny_model, path, {})
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


# --- torch.save ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("old", [False, True])
def test_a_state_dict_reads_as_written_in_either_format_of_torch(state, tmp_path, old):
    state = {**state, "half": torch.ones(2, dtype=torch.float16)}
    torch.save(state, tmp_path / "a.pth", _use_new_zipfile_serialization=not old)
    assert same(state, TorchFile(tmp_path / "a.pth"))


def test_the_zip_format_is_mapped_and_not_read(tmp_path):
    torch.save({"a": torch.ones(1000)}, tmp_path / "a.pth")
    with TorchFile(tmp_path / "a.pth"), open("/proc/self/maps", encoding="utf-8") as maps:
        assert str(tmp_path / "a.pth") in maps.read()


@pytest.mark.parametrize("key", ["state_dict", "model", "state_dict_ema", "model_ema"])
def test_weights_inside_a_training_checkpoint_are_found(state, tmp_path, key):
    others = {"epoch": 3, "optimizer": {"state": {0: torch.ones(2)}}, "args": argparse.Namespace(lr=0.1)}
    torch.save({**others, key: state}, tmp_path / "a.pth.tar")
    file = TorchFile(tmp_path / "a.pth.tar")
    assert same(state, file) and file.repairs == (f"nested under '{key}'",)


def test_averaged_weights_are_preferred_as_timm_prefers_them(state, tmp_path):
    torch.save({"state_dict": {"a": torch.zeros(1)}, "state_dict_ema": state}, tmp_path / "a.pth")
    assert same(state, TorchFile(tmp_path / "a.pth"))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_names_of_wrapped_models_are_unwrapped_and_that_is_told(state, tmp_path, prefix):
    torch.save({prefix + name: value for name, value in state.items()}, tmp_path / "a.pth")
    file = TorchFile(tmp_path / "a.pth")
    assert same(state, file) and sorted(file.repairs) == sorted(f"prefix {part}." for part in prefix.split(".")[:-1])


class Evil:
    def __reduce__(self):
        return os.mkdir, ("this code ran",)


@pytest.mark.parametrize("content, said", [
    ("model", r"torch.nn.modules.linear.Linear"), ("optimizer", r"torch.optim.sgd.SGD"), ("code", r"mkdir"),
    ("pickled code", "(another kind of pickle|mkdir)"), ("numpy", "another kind of pickle"),
])
@pytest.mark.parametrize("old", [False, True])
def test_objects_are_never_unpickled(tmp_path, monkeypatch, content, said, old):
    monkeypatch.chdir(tmp_path)
    layer = torch.nn.Linear(2, 2)
    if content in ("pickled code", "numpy"):
        with open("a.pth", "wb") as file:
            pickle.dump(Evil() if content == "pickled code" else {"a": np.ones(3)}, file, protocol=0 if old else 4)
    else:
        torch.save({"model": layer, "code": Evil(), "optimizer": {
            "model": layer.state_dict(), "optimizer": torch.optim.SGD(layer.parameters(), lr=1)}}[content], "a.pth",
            _use_new_zipfile_serialization=not old)
    with pytest.raises(ValueError, match=rf"a.pth holds more than tensors \(.*{said}\), and other objects are never "
                                         r"unpickled.*torch.save\(model.state_dict\(\), path\)"):
        TorchFile("a.pth")
    assert os.listdir() == ["a.pth"]


@pytest.mark.parametrize("content, message", [
    ([torch.ones(2)], "holds no state dict: expected tensors by name"),
    ({"epoch": 3}, "holds no state dict"), ({"model": {}}, "holds no state dict"),
    ({"a": torch.ones(2), "epoch": 3}, r"'epoch' is no plain tensor \(int\)"),
    ({"a": torch.ones(2), "b": torch.ones(2).to_sparse()}, r"'b' is no plain tensor \(sparse or quantised\)"),
    ({"a": torch.ones(2), "b": torch.ones(2, device="meta")}, r"'b' is no plain tensor"),
])
def test_what_is_no_state_dict_is_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=message):
        TorchFile(tmp_path / "a.pth")


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_integers_are_refused_where_weights_are_expected(tiny_config, state, tmp_path, ending):
    state["norm.weight"] = torch.ones(32, dtype=torch.int8)
    (torch.save if ending == "pth" else save_file)(state, tmp_path / f"a.{ending}")
    with pytest.raises(ValueError, match=r"'norm.weight' holds (int8|I8); expected floating-point numbers"):
        load(tmp_path / f"a.{ending}", config=tiny_config)


def test_damaged_files_of_torch_are_refused_in_one_sentence(state, tmp_path):
    path = tmp_path / "a.pth"
    damaged = [b"", b"404: Not Found", b"\x80\x02nonsense"]
    for old in (False, True):
        torch.save(state, path, _use_new_zipfile_serialization=not old)
        damaged += [path.read_bytes()[:length] for length in (50, 2000, -30)]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("notes.txt", "no weights")
    damaged.append(path.read_bytes())
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(ValueError, match="a.pth (is not a complete file of torch.save|holds more than)") as error:
            TorchFile(path)
        assert len(str(error.value).replace(str(tmp_path), "")) < 300 and "\n" not in str(error.value)


def test_the_record_of_a_model_survives_json(tiny_model):
    record = json.loads(json.dumps(tensors.record(tiny_model, {"classes": ["a"]})))
    assert record["config"]["gelu"] == "tanh" and record["config"]["mean"] == [0.5, 0.5, 0.5]
    assert (record["img_size"], record["grid"], record["num_classes"]) == ([16, 16], [4, 4], 5)
    assert record["classes"] == ["a"]
