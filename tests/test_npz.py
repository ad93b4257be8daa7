import logging

import numpy as np
import pytest
import torch

from models import npz
from models.archive import Archive
from models.configs import CONFIGS, replace
from models.modeling import VisionTransformer
from models.npz import identify, load_npz, save_npz
from tests.conftest import randomise
from tests.layouts import arrays_of


@pytest.fixture
def file(tiny_model, tmp_path):
    save_npz(tiny_model, tmp_path / "tiny.npz")
    return tmp_path / "tiny.npz"


def changed(path, **changes):
    """The same file with some arrays replaced, added (key with __ for /) or removed (None)."""
    arrays = arrays_of(path)
    for key, value in changes.items():
        arrays[key.replace("__", "/")] = value
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
    return path


def hybrid(tiny_config, stages=(1, 1)):
    config = replace(tiny_config, patch_size=(1, 1), resnet={"num_layers": stages, "width_factor": 0.5})
    return randomise(VisionTransformer(config, 32, 5))


@pytest.mark.parametrize("kind", ["token", "gap", "pre_logits", "hybrid", "root", "no head", "not square"])
def test_a_saved_model_loads_back_bit_for_bit(tiny_config, tmp_path, kind):
    model = {
        "token": lambda: VisionTransformer(tiny_config, 16, 5),
        "gap": lambda: VisionTransformer(replace(tiny_config, classifier="gap"), 16, 5),
        "pre_logits": lambda: VisionTransformer(replace(tiny_config, representation_size=20), 16, 5),
        "hybrid": lambda: hybrid(tiny_config), "root": lambda: hybrid(tiny_config, ()),
        "no head": lambda: VisionTransformer(tiny_config, 16, 0),
        "not square": lambda: VisionTransformer(tiny_config, (16, 36), 5),
    }[kind]()
    randomise(model)
    save_npz(model, tmp_path / "a.npz")
    again = load_npz(tmp_path / "a.npz")
    assert again.img_size == model.img_size and again.config.to_dict() == model.config.to_dict()
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    save_npz(again, tmp_path / "b.npz")
    first, second = arrays_of(tmp_path / "a.npz"), arrays_of(tmp_path / "b.npz")
    assert first.keys() == second.keys() and all(np.array_equal(first[key], second[key]) for key in first)


def test_keys_and_shapes_are_the_published_ones(file):
    shapes = {key: array.shape for key, array in arrays_of(file).items()}
    attention = "Transformer/encoderblock_1/MultiHeadDotProductAttention_1"
    assert shapes[f"{attention}/query/kernel"] == (32, 2, 16) and shapes[f"{attention}/out/kernel"] == (2, 16, 32)
    assert shapes[f"{attention}/key/bias"] == (2, 16) and shapes["embedding/kernel"] == (4, 4, 3, 32)
    assert shapes["Transformer/encoderblock_0/MlpBlock_3/Dense_0/kernel"] == (32, 64)
    assert shapes["Transformer/posembed_input/pos_embedding"] == (1, 17, 32) and shapes["cls"] == (1, 1, 32)
    assert all("\\" not in key for key in shapes)


def test_names_written_with_backslashes_are_read(file, tiny_model):
    arrays = {key.replace("/", "\\"): array for key, array in arrays_of(file).items()}
    np.savez(file, **arrays)
    assert torch.equal(load_npz(file).head.weight, tiny_model.head.weight)


def test_fine_tuning_gets_a_zero_head_and_no_pre_logits(tiny_config, tmp_path, caplog):
    save_npz(randomise(VisionTransformer(replace(tiny_config, representation_size=20), 16, 5)), tmp_path / "a.npz")
    with caplog.at_level(logging.INFO):
        model = load_npz(tmp_path / "a.npz", num_classes=7)
    assert model.head.weight.shape == (7, 32) and torch.count_nonzero(model.head.weight) == 0
    assert torch.count_nonzero(model.head.bias) == 0 and isinstance(model.pre_logits, torch.nn.Identity)
    assert "'head/kernel' not loaded: a new head of 7 classes" in caplog.text
    assert "'pre_logits/kernel' not loaded: fine-tuning drops it" in caplog.text


def test_an_unwanted_head_is_not_even_read(file, monkeypatch):
    read = []
    original = Archive.read
    monkeypatch.setattr(Archive, "read", lambda self, key: (read.append(key), original(self, key))[1])
    load_npz(file, num_classes=5)
    assert not [key for key in read if key.startswith("head")]
    assert len(read) == len(set(read)) == len(arrays_of(file)) - 2  # every other array once


def test_float16_and_bfloat16_files_load_as_float32(file, tiny_model):
    save_npz(tiny_model, file, dtype="float16")
    assert arrays_of(file)["cls"].dtype == np.float16
    assert torch.equal(load_npz(file).head.weight, tiny_model.head.weight.half().float())
    bits = {name: value.bfloat16().view(torch.int16).numpy().view("V2") for name, value in
            {"head/bias": tiny_model.head.bias.detach()}.items()}
    changed(file, **bits)
    assert torch.equal(load_npz(file).head.bias, tiny_model.head.bias.bfloat16().float())


def test_dtype_decides_the_parameters_and_the_resize(file):
    model = load_npz(file, img_size=24, dtype=torch.float64)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert not torch.equal(model.pos_embed, model.pos_embed.float().double())


def test_published_structure_brings_its_name_and_dropout(tmp_path):
    config = replace(CONFIGS["ViT-Ti_16"], num_layers=12)
    save_npz(VisionTransformer(config, 32, 3), tmp_path / "a.npz")
    assert load_npz(tmp_path / "a.npz").config.name == "ViT-Ti_16"
    asked = replace(config, dropout_rate=0.2)
    assert load_npz(tmp_path / "a.npz", config=asked).config.dropout_rate == 0.2


def test_identify_tells_what_a_file_is_without_reading_it(tiny_config, tmp_path, monkeypatch):
    config = replace(tiny_config, classifier="gap", representation_size=20)
    model = randomise(VisionTransformer(config, (16, 40), 5))
    save_npz(model, tmp_path / "a.npz")
    save_npz(model, tmp_path / "b.npz", dtype="float16")
    changed(tmp_path / "b.npz", head__bias=np.zeros(5, np.float32))
    what = identify(tmp_path / "a.npz")
    assert what.config == config and what.grid == (4, 10) and what.img_size == (16, 40) and what.num_classes == 5
    assert what.parameters == sum(p.numel() for p in model.parameters())
    assert what.family is None and what.candidates == ()
    assert what.size == (tmp_path / "a.npz").stat().st_size
    assert what.dtype == "float32" and identify(tmp_path / "b.npz").dtype == "mixed"
    changed(tmp_path / "a.npz", grid=None)
    monkeypatch.setattr(Archive, "read", None)  # no tensor is read
    assert identify(tmp_path / "a.npz").grid is None
    assert identify(tmp_path / "a.npz").img_size is None


def test_a_foreign_grid_that_is_not_square_is_asked_for_and_can_be_told(tiny_config, tmp_path):
    model = randomise(VisionTransformer(tiny_config, (16, 40), 5))
    save_npz(model, tmp_path / "a.npz")
    changed(tmp_path / "a.npz", grid=None)
    with pytest.raises(ValueError, match=r"40 positions are no square grid.*--img_size H,W.*array 'grid'"):
        load_npz(tmp_path / "a.npz")
    with pytest.raises(ValueError, match="no square grid"):
        load_npz(tmp_path / "a.npz", img_size=(24, 40))
    assert torch.equal(load_npz(tmp_path / "a.npz", img_size=(16, 40)).pos_embed, model.pos_embed)
    changed(tmp_path / "a.npz", grid=np.array([3, 9]))
    with pytest.raises(ValueError, match=r"'grid' says \(3, 9\), and there are 40 positions"):
        load_npz(tmp_path / "a.npz")


def test_another_variant_is_refused_with_both_named(tmp_path):
    save_npz(VisionTransformer(CONFIGS["ViT-Ti_16"], 32, 3), tmp_path / "a.npz")
    with pytest.raises(ValueError, match=r"holds a ViT-Ti_16, not ViT-S_16: hidden_size 192 instead of 384"):
        load_npz(tmp_path / "a.npz", config="ViT-S_16")


def test_missing_and_unknown_arrays_are_named(file):
    changed(file, Transformer__encoder_norm__scale=None, Transformer__encoder_norm__scael=np.zeros(32, np.float32))
    with pytest.raises(ValueError, match=r"missing 'Transformer/encoder_norm/scale'; unknown '.*/scael'"):
        load_npz(file)


def test_a_wrong_shape_says_expected_and_found(file):
    key = "Transformer__encoderblock_0__MlpBlock_3__Dense_1__kernel"
    changed(file, **{key: np.zeros((32, 64), np.float32)})
    with pytest.raises(ValueError, match=r"Dense_1/kernel' has shape \(32, 64\), expected \(64, 32\)"):
        load_npz(file)


def test_numbers_that_are_not_finite_are_refused(file):
    changed(file, cls=np.full((1, 1, 32), np.nan, np.float32))
    with pytest.raises(ValueError, match="'cls' holds values that are not finite"):
        load_npz(file)


def test_pickled_objects_are_refused(file):
    changed(file, cls=np.array([{"a": 1}], dtype=object))
    with pytest.raises(ValueError, match=r"tiny.npz: 'cls.npy' holds object; expected floating-point numbers"):
        load_npz(file)


def test_a_truncated_file_and_a_text_file_are_refused(file):
    content = file.read_bytes()
    for damaged in (content[: len(content) // 2], b"<html>403</html>", b""):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match="is not a complete"):
            load_npz(file)


def test_a_damaged_array_is_named(file):
    content = bytearray(file.read_bytes())
    at = content.find(arrays_of(file)["head/kernel"].tobytes()[:64])
    content[at : at + 4] = b"\0\1\2\3"
    file.write_bytes(content)
    with pytest.raises(ValueError, match="head/kernel"):
        load_npz(file)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*ViT-B_16.npz"):
        load_npz(tmp_path / "ViT-B_16.npz")


def test_another_kind_of_npz_is_refused(tmp_path):
    np.savez(tmp_path / "a.npz", weights=np.zeros(3))
    with pytest.raises(ValueError, match="no Vision Transformer of Google's"):
        load_npz(tmp_path / "a.npz")


@pytest.mark.parametrize("name", CONFIGS)
def test_the_table_fills_every_parameter_of_every_model_once(name):
    config = replace(CONFIGS[name], representation_size=8)
    with torch.device("meta"):
        model = VisionTransformer(config, 224, 3)
    rows = npz.table(model)
    assert len({row.key for row in rows}) == len(rows)
    filled = sorted((row.parameter, row.third) for row in rows)
    wanted = [(p, t) for p, _ in model.named_parameters() for t in ((0, 1, 2) if ".qkv." in p else (None,))]
    assert filled == sorted(wanted)


def test_values_that_the_layout_cannot_carry_are_refused(tiny_config, tmp_path):
    model = VisionTransformer(replace(tiny_config, gelu="erf"), 16, 5)
    with pytest.raises(ValueError, match="cannot carry gelu = erf"):
        save_npz(model, tmp_path / "a.npz")
    assert not list(tmp_path.iterdir())
