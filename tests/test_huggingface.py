import json
import os
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from models import exchange, huggingface
from models.configs import replace
from models.exchange import load
from models.huggingface import save_folder
from models.modeling import VisionTransformer
from tests.conftest import randomise
from tests.test_exchange import images, same, transformers_names

NAMES = ["cat", "dog", "crane", "crane", "cat"]  # as in ImageNet, a name may stand for two classes


@pytest.fixture
def folder(tiny_model, tmp_path):
    save_folder(tiny_model, tmp_path / "folder", {"classes": NAMES, "accuracy": 0.5})
    return tmp_path / "folder"


def edit(path, **changes):
    card = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in card.items() if value is not None}))


def without_record(folder):
    """As transformers itself would write it: our header is lost."""
    save_file(load_file(folder / "model.safetensors"), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


# --- Read ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("new", [False, True])
@pytest.mark.parametrize("kind", ["classifier", "pooler"])
def test_a_file_with_transformers_names_gives_equal_logits(tiny_config, tmp_path, kind, new):
    pooled = replace(tiny_config, representation_size=32)
    model = randomise(VisionTransformer(*((tiny_config, 16, 5) if kind == "classifier" else (pooled, 16, 0))))
    save_file(transformers_names(model, new), tmp_path / "model.safetensors")
    again = load(tmp_path / "model.safetensors", config=tiny_config).eval()
    assert same(again, model) and again.config.representation_size == model.config.representation_size
    assert torch.equal(again(images(model)), model(images(model)))


def test_transformers_card_tells_gelu_and_epsilon_unless_the_weights_are_googles(tiny_model, tiny_config, tmp_path):
    save_file(transformers_names(tiny_model), tmp_path / "model.safetensors")
    card = {"num_attention_heads": 2, "hidden_act": "gelu", "layer_norm_eps": 1e-12}
    (tmp_path / "config.json").write_text(json.dumps(card))
    config = load(tmp_path / "model.safetensors").config
    assert (config.num_heads, config.gelu, config.norm_eps) == (2, "erf", 1e-12)
    config = load(tmp_path / "model.safetensors", config=tiny_config, google=True).config
    assert (config.gelu, config.norm_eps) == ("tanh", 1e-6)


def test_a_pooler_beside_a_classifier_is_refused(tiny_model, tiny_config, tmp_path):
    tensors = transformers_names(tiny_model) | {"vit.pooler.dense.weight": torch.zeros(32, 32)}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"unknown 'pooler.dense.weight'"):
        load(tmp_path / "model.safetensors", config=tiny_config)


def test_a_folder_is_read_by_its_cards_alone(folder, tiny_model, tiny_config):
    model = load(without_record(folder))
    assert same(model, tiny_model) and model.config == tiny_config
    assert exchange.read_metadata(folder) == {"classes": NAMES}
    assert exchange.identify(folder).layout == "transformers"


def test_a_folder_of_ours_brings_its_whole_record_back(folder, tiny_model):
    assert same(load(folder), tiny_model)
    record = exchange.read_metadata(folder)
    assert record["classes"] == NAMES and record["accuracy"] == 0.5 and record["img_size"] == [16, 16]


def test_pytorch_model_bin_and_the_hubs_cache_are_read(folder, tiny_model, tmp_path):
    cache = tmp_path / "models--google--vit-tiny"
    snapshot = cache / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0123abcd")
    torch.save(transformers_names(tiny_model, new=True), cache / "blobs" / "ff00")
    shutil.copy(folder / "config.json", cache / "blobs" / "ee11")
    os.symlink("../../blobs/ff00", snapshot / "pytorch_model.bin")
    os.symlink("../../blobs/ee11", snapshot / "config.json")
    for path in (cache, snapshot, snapshot / "pytorch_model.bin"):
        assert same(load(path), tiny_model) and exchange.describe(path)[1] == (16, 16)


@pytest.mark.parametrize("changes, mean, std", [
    ({}, 0.5, 0.5), ({"image_mean": [0.1, 0.1, 0.1], "image_std": 0.2}, 0.1, 0.2),
    ({"do_normalize": False}, 0.0, 1.0), ({"do_rescale": False, "image_mean": 127.5, "image_std": 127.5}, 0.5, 0.5),
    ({"rescale_factor": 1 / 127.5, "image_mean": [1, 1, 1], "image_std": [1, 1, 1]}, 0.5, 0.5),
    ({"do_rescale": None, "rescale_factor": None}, 0.5, 0.5),
])
def test_the_normalisation_comes_from_the_preprocessor(folder, changes, mean, std):
    edit(folder / "preprocessor_config.json", **changes)
    config = load(without_record(folder)).config
    assert config.mean == pytest.approx((mean,) * 3) and config.std == pytest.approx((std,) * 3)


def test_a_grid_that_is_not_square_and_a_remainder_are_known_from_the_card(tiny_config, tmp_path):
    model = randomise(VisionTransformer(tiny_config, (17, 24), 5))
    save_folder(model, tmp_path / "a", {})
    again = load(without_record(tmp_path / "a"))
    assert again.img_size == (17, 24) and again.grid == (4, 6) and same(again, model)


def test_numbered_labels_are_no_names(tiny_model, tmp_path):
    save_folder(tiny_model, tmp_path / "a", {})
    assert exchange.read_metadata(without_record(tmp_path / "a")) == {}
    edit(tmp_path / "a" / "config.json", id2label={"10": "k", "2": "c", "0": "a"})
    assert exchange.read_metadata(tmp_path / "a") == {"classes": ["a", "c", "k"]}


@pytest.mark.parametrize("changes, message", [
    ({"hidden_act": "quick_gelu"}, r"hidden_act 'quick_gelu'; known are gelu_pytorch_tanh, gelu, gelu_new"),
    ({"pooler_act": "relu"}, r"pooler_act 'relu'; only tanh"), ({"num_attention_heads": 3}, r"says 3 attention heads"),
])
def test_a_card_that_no_model_of_ours_fulfils_is_refused(folder, changes, message):
    edit(folder / "config.json", **changes)
    with pytest.raises(ValueError, match=message):
        load(without_record(folder))


def test_folders_without_weights_or_with_weights_in_parts_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"is a folder without model.safetensors or pytorch_model.bin"):
        load(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"in several files, which is not read here.*max_shard_size"):
        load(tmp_path)


# --- Write -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["plain", "erf", "not square", "remainder", "one channel", "no head", "patch"])
def test_transformers_reads_a_folder_with_nothing_left_over_and_equal_logits(tiny_config, tmp_path, kind):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    changes, size, classes = {
        "plain": ({}, 16, 5), "erf": ({"gelu": "erf", "norm_eps": 1e-3}, 16, 5), "not square": ({}, (16, 24), 5),
        "remainder": ({}, 18, 5), "one channel": ({"in_chans": 1, "mean": (0.5,), "std": (0.5,)}, 16, 2),
        "no head": ({}, 16, 0), "patch": ({"patch_size": (4, 8)}, 16, 1)}[kind]
    model = randomise(VisionTransformer(replace(tiny_config, **changes), size, classes))
    save_folder(model, tmp_path / "a", {"classes": NAMES[:classes]})
    theirs, said = transformers.ViTForImageClassification.from_pretrained(tmp_path / "a", output_loading_info=True)
    assert not any(said.values()) and list(theirs.config.id2label.values()) == NAMES[:classes]
    x = images(model)
    torch.testing.assert_close(theirs.eval()(x).logits, model(x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(huggingface.logits(tmp_path / "a", x), model(x), atol=1e-5, rtol=1e-5)

    theirs.save_pretrained(tmp_path / "b")  # and back: without our record, and without the preprocessor
    again = load(tmp_path / "b")
    assert same(again, model) and again.img_size == model.img_size
    assert torch.equal(again.eval()(x), model(x))


def test_transformers_prepares_images_as_the_configuration_says(tiny_config, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = replace(tiny_config, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
    save_folder(VisionTransformer(config, (16, 24), 5), tmp_path / "a", {})
    pixels = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    prepared = transformers.AutoImageProcessor.from_pretrained(tmp_path / "a")(pixels, return_tensors="pt")
    expected = (torch.from_numpy(pixels) / 255 - torch.tensor(config.mean)) / torch.tensor(config.std)
    torch.testing.assert_close(prepared["pixel_values"][0], expected.permute(2, 0, 1), atol=1e-5, rtol=1e-5)


def test_sixteen_bit_folders_hold_the_rounded_values(tiny_model, tmp_path):
    save_folder(tiny_model, tmp_path / "a", {}, dtype=torch.float16)
    assert exchange.identify(tmp_path / "a").dtype == "float16"
    assert torch.equal(load(tmp_path / "a").head.weight, tiny_model.head.weight.half().float())


@pytest.mark.parametrize("changes, message", [
    ({"classifier": "gap"}, "no mean over the tokens"), ({"representation_size": 20}, "no layer .pre_logits. before"),
    ({"patch_size": (1, 1), "resnet": {"num_layers": (1,), "width_factor": 0.5}}, "no ResNet stem"),
])
def test_what_the_format_cannot_hold_is_refused(tiny_config, tmp_path, changes, message):
    model = VisionTransformer(replace(tiny_config, **changes), 16, 5)
    with pytest.raises(ValueError, match=f"Hugging Face's ViT has {message}.*Write it as .safetensors, .npz or .onnx"):
        save_folder(model, tmp_path / "a", {})
    assert not list(tmp_path.iterdir())


def test_too_few_names_of_classes_are_refused(tiny_model, tmp_path):
    with pytest.raises(ValueError, match="There are 2 names of classes for a model of 5 classes"):
        save_folder(tiny_model, tmp_path / "a", {"classes": ["cat", "dog"]})


def test_a_folder_is_replaced_only_when_asked_and_only_one_of_ours(folder, tiny_model):
    with pytest.raises(ValueError, match="holds a model already"):
        save_folder(tiny_model, folder, {})
    save_folder(tiny_model, folder, {}, overwrite=True)
    assert "LABEL_0" in (folder / "config.json").read_text()
    (folder / "README.md").write_text("precious")
    with pytest.raises(ValueError, match=r"holds other things than a Hugging Face model \(README.md\) and is never"):
        save_folder(tiny_model, folder, {}, overwrite=True)
    (folder / "README.md").unlink()
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match="holds other things"):
        save_folder(tiny_model, folder, {}, overwrite=True)
    with pytest.raises(ValueError, match="is a file; a folder would go there"):
        save_folder(tiny_model, folder / "model.safetensors", {})


def test_an_unfinished_folder_leaves_the_old_one_and_no_other(folder, tiny_model, monkeypatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full_disk(*_):
        raise OSError("No space left on device")
    monkeypatch.setattr(huggingface, "write", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_folder(randomise(tiny_model, seed=1), folder, {}, overwrite=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert list(folder.parent.iterdir()) == [folder]


def test_an_empty_folder_is_free(tiny_model, tmp_path):
    (tmp_path / "a").mkdir()
    save_folder(tiny_model, tmp_path / "a", {})
    assert same(load(tmp_path / "a"), tiny_model) and [path.name for path in tmp_path.iterdir()] == ["a"]


def test_the_names_of_the_tensors_are_those_that_every_transformers_reads(tiny_model, folder):
    expected = transformers_names(tiny_model)
    saved = load_file(folder / "model.safetensors")
    assert saved.keys() == expected.keys() and all(torch.equal(saved[name], expected[name]) for name in saved)
