import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file

from models import exchange
from models.configs import CONFIGS, replace
from models.exchange import load, read_metadata, save
from models.modeling import VisionTransformer
from models.npz import load_npz, resize_pos_embed, save_npz
from tests.conftest import randomise

METADATA = {"classes": ["cat", "dog"], "accuracy": 0.5, "fine_tuned_from": ["ViT-B_16", "00ff"], "command": "train.py"}


@pytest.fixture
def bare(tiny_model, tmp_path):
    """timm's form: parameters under their names, nothing else."""
    save_file(tiny_model.state_dict(), tmp_path / "bare.safetensors")
    return tmp_path / "bare.safetensors"


@pytest.fixture
def file(tiny_model, tmp_path):
    save(tiny_model, tmp_path / "ours.safetensors", METADATA)
    return tmp_path / "ours.safetensors"


def changed(path, **changes):
    """The same file without a header, some tensors replaced, added (key with __ for .) or removed (None)."""
    tensors = load_file(path)
    for key, value in changes.items():
        tensors[key.replace("__", ".")] = value
    save_file({key: value for key, value in tensors.items() if value is not None}, path)
    return path


def same(a, b):
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in ours.items())


def images(model, count=2):
    return torch.rand(count, 3, *model.img_size, generator=torch.Generator().manual_seed(1)) * 2 - 1


def transformers_names(model, new=False):
    """The tensors of `model` as transformers' ViT names them (before and since 5.0), written down by hand."""
    w = model.state_dict()
    out = {"embeddings.cls_token": w["cls_token"], "embeddings.position_embeddings": w["pos_embed"]}
    for kind in ("weight", "bias"):
        out[f"embeddings.patch_embeddings.projection.{kind}"] = w[f"patch_embed.proj.{kind}"]
        out[f"layernorm.{kind}"] = w[f"norm.{kind}"]
        for i in range(model.config.num_layers):
            layer, block = f"{'layers' if new else 'encoder.layer'}.{i}", f"blocks.{i}"
            attention = "attention" if new else "attention.attention"
            for name, third in zip("qkv" if new else ("query", "key", "value"), w[f"{block}.attn.qkv.{kind}"].chunk(3)):
                out[f"{layer}.{attention}.{name}{'_proj' if new else ''}.{kind}"] = third.clone()
            out[f"{layer}.attention.{'o_proj' if new else 'output.dense'}.{kind}"] = w[f"{block}.attn.proj.{kind}"]
            out[f"{layer}.{'mlp.fc1' if new else 'intermediate.dense'}.{kind}"] = w[f"{block}.mlp.fc1.{kind}"]
            out[f"{layer}.{'mlp.fc2' if new else 'output.dense'}.{kind}"] = w[f"{block}.mlp.fc2.{kind}"]
            out[f"{layer}.layernorm_before.{kind}"] = w[f"{block}.norm1.{kind}"]
            out[f"{layer}.layernorm_after.{kind}"] = w[f"{block}.norm2.{kind}"]
        if model.config.representation_size:
            out[f"pooler.dense.{kind}"] = w[f"pre_logits.fc.{kind}"]
    if model.num_classes:
        out = {f"vit.{key}": value for key, value in out.items()}
        out |= {"classifier.weight": w["head.weight"], "classifier.bias": w["head.bias"]}
    return out


# --- Ours ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["token", "gap", "pre_logits", "hybrid", "root", "no head", "not square", "erf",
                                  "remainder"])
def test_a_saved_model_loads_back_bit_for_bit_with_its_config(tiny_config, tmp_path, kind):
    config, size, classes = {
        "token": ({}, 16, 5), "gap": ({"classifier": "gap"}, 16, 5), "pre_logits": ({"representation_size": 20}, 16, 5),
        "hybrid": ({"patch_size": (1, 1), "resnet": {"num_layers": (1, 1), "width_factor": 0.5}}, 32, 5),
        "root": ({"patch_size": (1, 1), "resnet": {"num_layers": (), "width_factor": 0.5}}, 32, 5),
        "no head": ({}, 16, 0), "not square": ({}, (16, 36), 5), "remainder": ({}, 17, 5),
        "erf": ({"gelu": "erf", "norm_eps": 1e-5, "mean": (0.4, 0.5, 0.6), "dropout_rate": 0.1}, 16, 5),
    }[kind]
    model = randomise(VisionTransformer(replace(tiny_config, **config), size, classes))
    save(model, tmp_path / "a.safetensors", {})
    again = load(tmp_path / "a.safetensors")
    assert same(model, again)
    assert again.config == model.config and again.img_size == model.img_size and again.grid == model.grid
    assert torch.equal(again.eval()(images(model)), model(images(model)))


def test_the_header_has_what_was_given_and_the_model(file, tiny_model):
    record = read_metadata(file)
    assert {key: record[key] for key in METADATA} == METADATA
    assert record["config"]["num_heads"] == 2 and record["num_classes"] == 5
    assert record["img_size"] == [16, 16] and record["grid"] == [4, 4]


def test_metadata_of_other_files_is_empty(bare, tmp_path, tiny_model):
    save_npz(tiny_model, tmp_path / "a.npz")
    assert read_metadata(bare) == {} and read_metadata(tmp_path / "a.npz") == {}


def test_sixteen_bit_files_load_as_the_rounded_values(tiny_model, tmp_path):
    for dtype in (torch.float16, torch.bfloat16):
        save(tiny_model, tmp_path / "a.safetensors", {}, dtype=dtype)
        weight = load(tmp_path / "a.safetensors").head.weight
        assert weight.dtype == torch.float32 and torch.equal(weight, tiny_model.head.weight.to(dtype).float())
    assert load(tmp_path / "a.safetensors", dtype=torch.float64).head.weight.dtype == torch.float64


def test_an_unfinished_save_leaves_the_old_file_and_no_other(file, tiny_model, monkeypatch):
    before = file.read_bytes()

    def full_disk(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("No space left on device")
    monkeypatch.setattr(exchange, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save(tiny_model, file, {})
    assert file.read_bytes() == before and list(file.parent.iterdir()) == [file]


def test_a_number_of_classes_gives_a_zero_head_and_no_pre_logits(tiny_config, tmp_path, caplog):
    model = randomise(VisionTransformer(replace(tiny_config, representation_size=20), 16, 5))
    save(model, tmp_path / "a.safetensors", {})
    with caplog.at_level(logging.INFO):
        start = load(tmp_path / "a.safetensors", num_classes=7)
    assert start.head.weight.shape == (7, 32) and not start.head.weight.any() and not start.head.bias.any()
    assert start.config.representation_size is None and torch.equal(start.norm.weight, model.norm.weight)
    assert "'head.weight' not loaded: a new head of 7 classes takes its place" in caplog.text
    assert "'pre_logits.fc.weight' not loaded" in caplog.text


def test_another_size_resizes_the_position_embedding_as_google_does(file, bare, tiny_model):
    expected = resize_pos_embed(tiny_model.pos_embed.detach(), (4, 4), (6, 8)).float()
    for path in (file, bare):
        model = load(path, img_size=(24, 32), config=tiny_model.config)
        assert model.grid == (6, 8) and torch.equal(model.pos_embed, expected)


def test_an_npz_is_read_as_load_npz_reads_it(tiny_model, tmp_path):
    save_npz(tiny_model, tmp_path / "a.npz")
    assert same(load(tmp_path / "a.npz", img_size=32, num_classes=3),
                load_npz(tmp_path / "a.npz", img_size=32, num_classes=3))


# --- timm ------------------------------------------------------------------------------------------------------------

def test_a_file_with_timms_names_gives_equal_logits(bare, tiny_model, tiny_config):
    model = load(bare, config=tiny_config).eval()
    assert same(model, tiny_model) and torch.equal(model(images(model)), tiny_model(images(model)))


def test_the_heads_of_a_published_structure_are_known(tmp_path):
    model = randomise(VisionTransformer(CONFIGS["ViT-demo"], 32, 4))
    save_file(model.state_dict(), tmp_path / "demo.safetensors")
    assert load(tmp_path / "demo.safetensors").config == model.config


def test_unknown_heads_are_asked_for(bare):
    with pytest.raises(ValueError, match=r"number of attention heads.*width 32, 2 layers, patch 4 x 4.*--model_type"):
        load(bare)


@pytest.mark.parametrize("card, gelu", [
    ({"architecture": "vit_base_patch16_224", "pretrained_cfg": {"tag": "augreg_in21k_ft_in1k"}}, "tanh"),
    ({"architecture": "vit_base_patch16_224", "pretrained_cfg": {"tag": "augreg2_in21k_ft_in1k"}}, "erf"),
    ({"architecture": "vit_base_patch16_224.orig_in21k"}, "tanh"),
    ({"architecture": "vit_base_patch16_224", "pretrained_cfg": {"tag": "sam_in1k"}}, "tanh"),
    ({"architecture": "vit_base_patch16_224", "pretrained_cfg": {"tag": "mae"}}, "erf"),
    ({"architecture": "vit_base_patch16_224"}, "erf"),
])
def test_the_gelu_form_follows_who_trained_the_weights(bare, tiny_config, card, gelu):
    bare.with_name("config.json").write_text(json.dumps(card))
    assert load(bare, config=tiny_config).config.gelu == gelu
    assert load(bare, config=tiny_config, google=True).config.gelu == "tanh"


def test_the_normalisation_of_timms_card_goes_with_the_weights(bare, tiny_config):
    card = {"architecture": "x", "pretrained_cfg": {"tag": "mae", "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.2, 0.2]}}
    bare.with_name("config.json").write_text(json.dumps(card))
    config = load(bare, config=tiny_config).config
    assert config.mean == (0.4, 0.5, 0.6) and config.std == (0.2, 0.2, 0.2)


def test_without_a_card_the_gelu_form_is_said(bare, tiny_config, caplog):
    with caplog.at_level(logging.INFO):
        assert load(bare, config=tiny_config).config.gelu == "tanh"
    assert "bare.safetensors does not record its GELU form; taken as Google's tanh." in caplog.text


def timm_tiny(**arguments):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    return timm.models.VisionTransformer(
        img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2, mlp_ratio=2, num_classes=5,
        act_layer=lambda: torch.nn.GELU(approximate="tanh"),
        norm_layer=lambda width, **_: torch.nn.LayerNorm(width, eps=1e-6), **arguments)


@pytest.mark.parametrize("pooling", ["token", "gap"])
def test_timm_and_ours_load_each_others_files_strictly_with_equal_logits(tiny_config, tmp_path, pooling):
    theirs = randomise(timm_tiny(global_pool="token") if pooling == "token" else
                       timm_tiny(global_pool="avg", class_token=False, fc_norm=False))
    save_file(theirs.state_dict(), tmp_path / "timm.safetensors")
    ours = load(tmp_path / "timm.safetensors", config=tiny_config).eval()
    x = images(ours)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)

    save(randomise(ours, seed=1), tmp_path / "ours.safetensors", {})
    theirs.load_state_dict(load_file(tmp_path / "ours.safetensors"), strict=True)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name, timms", [("R+ViT-Ti_16", "vit_tiny_r_s16_p8_224"),
                                         ("R26+ViT-S_32", "vit_small_r26_s32_224")])
def test_a_hybrid_of_timms_is_known_by_its_names(tmp_path, name, timms):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    with torch.device("meta"):
        theirs = timm.create_model(timms, num_classes=3)
    theirs.to_empty(device="cpu").load_state_dict({k: torch.zeros(v.shape) for k, v in theirs.state_dict().items()})
    save_file(theirs.state_dict(), tmp_path / "hybrid.safetensors")
    ours = load(tmp_path / "hybrid.safetensors")
    assert ours.config == CONFIGS[name]
    theirs.load_state_dict(ours.state_dict(), strict=True)


# --- transformers ----------------------------------------------------------------------------------------------------

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


# --- Errors ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("changes, message", [
    ({"blocks__0__norm1__weight": None}, r"missing 'blocks.0.norm1.weight'"),
    ({"fc_norm__weight": torch.ones(32)}, r"unknown 'fc_norm.weight'"),
    ({"blocks__1__ls1__gamma": torch.ones(32)}, r"unknown 'blocks.1.ls1.gamma'"),
    ({"head__weight": torch.ones(32, 5)}, r"'head.weight' has shape \(32, 5\), expected \(5, 32\)"),
    ({"patch_embed__proj__weight": torch.ones(32, 1, 4, 4)}, r"has shape \(32, 1, 4, 4\), expected \(32, 3, 4, 4\)"),
    ({"norm__bias": torch.full((32,), torch.nan)}, r"'norm.bias' holds values that are not finite"),
    ({"pos_embed": torch.ones(1, 16, 32)}, r"15 positions are no square grid.*Give its own size"),
    ({"patch_embed__proj__weight": None}, r"no Vision Transformer.*'patch_embed.proj.weight'"),
    ({"pos_embed": None}, r"has no 'pos_embed'"),
])
def test_what_is_wrong_with_a_file_is_named(bare, tiny_config, changes, message):
    with pytest.raises(ValueError, match=message):
        load(changed(bare, **changes), config=tiny_config)


def test_a_grid_that_is_not_square_can_be_told(tiny_config, tmp_path):
    model = randomise(VisionTransformer(tiny_config, (16, 20), 5))
    save_file(model.state_dict(), tmp_path / "a.safetensors")
    assert same(load(tmp_path / "a.safetensors", img_size=(16, 20), config=tiny_config), model)


def test_another_architecture_than_asked_for_is_refused(file):
    with pytest.raises(ValueError, match=r"not ViT-B_16: .*hidden_size 32 instead of 768"):
        load(file, config="ViT-B_16")


def test_other_endings_missing_and_damaged_files_are_refused(file, tmp_path):
    with pytest.raises(ValueError, match=r"read from .npz and .safetensors files, not from '.bin'"):
        load(tmp_path / "a.bin")
    with pytest.raises(FileNotFoundError, match="There is no checkpoint at"):
        load(tmp_path / "none.safetensors")
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match="not a complete"):
        load(file)


def test_a_card_that_pools_otherwise_is_refused(bare, tiny_config):
    bare.with_name("config.json").write_text(json.dumps({"architecture": "vit_x.mae", "global_pool": "avg"}))
    with pytest.raises(ValueError, match=r"global_pool 'avg', and the weights come with a class token"):
        load(bare, config=tiny_config)
