import json
import logging

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from models import npz
from models.configs import CONFIGS, replace
from models.exchange import load, read_metadata, save
from models.fill import resize_pos_embed
from models.modeling import VisionTransformer
from models.npz import load_npz, save_npz
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
    return torch.rand(count, model.config.in_chans, *model.img_size, generator=torch.Generator().manual_seed(1)) * 2 - 1


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


def test_the_same_weights_are_the_same_model_in_every_file(tiny_model, tiny_config, bare, tmp_path):
    save_npz(tiny_model, tmp_path / "a.npz")
    state = tiny_model.state_dict()
    torch.save(state, tmp_path / "a.pth")
    torch.save({"model": state, "epoch": 3}, tmp_path / "b.bin", _use_new_zipfile_serialization=False)
    torch.save(vit_pytorch_names(tiny_model), tmp_path / "c_checkpoint.bin")
    torch.save(transformers_names(tiny_model), tmp_path / "pytorch_model.bin")
    for name in ("a.npz", "a.pth", "b.bin", "c_checkpoint.bin", "pytorch_model.bin", bare.name):
        assert same(load(tmp_path / name, config=tiny_config), tiny_model), name
        start = load(tmp_path / name, config=tiny_config, img_size=(24, 32), num_classes=3, in_chans=1)
        assert (start.grid, start.num_classes, start.config.in_chans) == ((6, 8), 3, 1)
        expected = tiny_model.patch_embed.proj.weight.sum(dim=1, keepdim=True)
        torch.testing.assert_close(start.patch_embed.proj.weight, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["token", "hybrid", "root"])
def test_a_file_for_one_channel_loads_as_such(tiny_config, tmp_path, kind):
    hybrid = {"patch_size": (1, 1), "resnet": {"num_layers": (1,) if kind == "hybrid" else (), "width_factor": 0.5}}
    config = npz.with_channels(replace(tiny_config, **({} if kind == "token" else hybrid)), 1)
    model = randomise(VisionTransformer(config, 32, 5))
    save_file(model.state_dict(), tmp_path / "a.safetensors")
    again = load(tmp_path / "a.safetensors", config=config).eval()
    assert again.config.in_chans == 1 and again.config.mean == (0.5,) and same(again, model)
    assert torch.equal(again(images(model)), model(images(model)))


# --- timm's card -----------------------------------------------------------------------------------------------------

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
    ({"architecture": "vit_base_patch16_224.mae", "model_args": {"act_layer": "gelu_tanh"}}, "tanh"),
    ({"architecture": "vit_base_patch16_224.orig_in21k", "model_args": {"act_layer": "gelu"}}, "erf"),
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


def test_what_nobody_recorded_is_googles_and_said(bare, tiny_config, caplog):
    with caplog.at_level(logging.INFO):
        config = load(bare, config=tiny_config).config
    assert (config.gelu, config.norm_eps, config.mean) == ("tanh", 1e-6, (0.5, 0.5, 0.5))
    assert ("bare.safetensors: not recorded, so as Google's: GELU tanh, norm epsilon 1e-06, mean (0.5, 0.5, 0.5), "
            "deviation (0.5, 0.5, 0.5).") in caplog.messages
    caplog.clear()
    bare.with_name("config.json").write_text(json.dumps({"architecture": "x.mae", "mean": [0.4, 0.5, 0.6]}))
    with caplog.at_level(logging.INFO):
        load(bare, config=tiny_config)
    assert ("bare.safetensors: config.json beside it (gelu) says GELU erf, mean (0.4, 0.5, 0.6); not recorded, so as "
            "Google's: norm epsilon 1e-06, deviation (0.5, 0.5, 0.5).") in caplog.messages


def test_the_normalisation_follows_the_channels_or_is_refused(tiny_config, tmp_path):
    model = randomise(VisionTransformer(npz.with_channels(tiny_config, 1), 16, 5))
    save_file(model.state_dict(), tmp_path / "a.safetensors")
    card = {"architecture": "x", "mean": [0.4, 0.4, 0.4], "std": [0.2]}
    (tmp_path / "config.json").write_text(json.dumps(card))
    config = load(tmp_path / "a.safetensors", config=tiny_config).config
    assert config.mean == (0.4,) and config.std == (0.2,)
    (tmp_path / "config.json").write_text(json.dumps({**card, "mean": [0.4, 0.5, 0.6]}))
    with pytest.raises(ValueError, match=r"gives a mean for 3 channels, and the weights are for 1"):
        load(tmp_path / "a.safetensors", config=tiny_config)


@pytest.mark.parametrize("card, message", [
    ({"architecture": "vit_x.mae", "global_pool": "avg"},
     r"global_pool 'avg', and the weights come with a class token"),
    ({"architecture": "vit_base_patch16_clip_quickgelu_224"}, r"act_layer 'quickgelu'; known are gelu, gelu_tanh"),
    ({"architecture": "vit_base_patch32_siglip_gap_256"}, r"act_layer 'siglip'.*write it there under model_args"),
    ({"architecture": "x", "mean": [0.1, 0.2]}, r"a mean for 2 channels, and the weights are for 3"),
    ({"architecture": "vit_x", "model_args": {"act_layer": "silu"}}, r"act_layer 'silu'"),
    ({"architecture": "vit_x", "model_args": {"num_heads": 5}}, r"says 5 attention heads, and the width is 32"),
])
def test_a_card_that_no_model_of_ours_fulfils_is_refused(bare, tiny_config, card, message):
    bare.with_name("config.json").write_text(json.dumps(card))
    with pytest.raises(ValueError, match=message):
        load(bare, config=tiny_config)


def test_a_card_that_is_not_json_is_named(bare, tiny_config):
    bare.with_name("config.json").write_text("{half")
    with pytest.raises(ValueError, match=r"config.json is not JSON .*Correct it or move it away"):
        load(bare, config=tiny_config)


def test_the_card_tells_heads_and_a_grid_that_is_not_square(tiny_config, tmp_path):
    model = randomise(VisionTransformer(tiny_config, (8, 32), 5))  # 2 x 8 positions, which could be 4 x 4
    save_file(model.state_dict(), tmp_path / "a.safetensors")
    card = {"architecture": "vit_x", "model_args": {"num_heads": 2}, "pretrained_cfg": {"input_size": [3, 8, 32]}}
    (tmp_path / "config.json").write_text(json.dumps(card))
    again = load(tmp_path / "a.safetensors")
    assert again.grid == (2, 8) and again.img_size == (8, 32) and again.config.num_heads == 2


# --- ViT-pytorch -----------------------------------------------------------------------------------------------------

def vit_pytorch_names(model):
    """The tensors of `model` as jeonsworld/ViT-pytorch names them, written down by hand from its `modeling.py`."""
    w, top = model.state_dict(), "transformer.embeddings"
    out = {f"{top}.position_embeddings": w["pos_embed"], f"{top}.cls_token": w["cls_token"]}
    for kind in ("weight", "bias"):
        out[f"{top}.patch_embeddings.{kind}"] = w[f"patch_embed.proj.{kind}"]
        for i in range(model.config.num_layers):
            layer, block = f"transformer.encoder.layer.{i}", f"blocks.{i}"
            out[f"{layer}.attention_norm.{kind}"] = w[f"{block}.norm1.{kind}"]
            out[f"{layer}.ffn_norm.{kind}"] = w[f"{block}.norm2.{kind}"]
            out[f"{layer}.ffn.fc1.{kind}"] = w[f"{block}.mlp.fc1.{kind}"]
            out[f"{layer}.ffn.fc2.{kind}"] = w[f"{block}.mlp.fc2.{kind}"]
            for name, third in zip(("query", "key", "value"), w[f"{block}.attn.qkv.{kind}"].chunk(3)):
                out[f"{layer}.attn.{name}.{kind}"] = third.clone()
            out[f"{layer}.attn.out.{kind}"] = w[f"{block}.attn.proj.{kind}"]
        out[f"transformer.encoder.encoder_norm.{kind}"] = w[f"norm.{kind}"]
        out[f"head.{kind}"] = w[f"head.{kind}"]
    return out


def vit_pytorch_logits(w, x, heads):
    """What ViT-pytorch computes: erf GELU, epsilon 1e-6; `modeling.py:VisionTransformer.forward` from its names."""
    def linear(x, name):
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)
    top, kernel = "transformer.embeddings", w["transformer.embeddings.patch_embeddings.weight"]
    x = F.conv2d(x, kernel, w[f"{top}.patch_embeddings.bias"], stride=kernel.shape[2:]).flatten(2).transpose(1, 2)
    x = torch.cat([w[f"{top}.cls_token"].expand(len(x), -1, -1), x], dim=1) + w[f"{top}.position_embeddings"]
    for i in range(2):
        layer = f"transformer.encoder.layer.{i}"
        y = norm(x, f"{layer}.attention_norm")
        q, k, v = (linear(y, f"{layer}.attn.{n}").unflatten(2, (heads, -1)).transpose(1, 2)
                   for n in ("query", "key", "value"))
        y = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(dim=-1) @ v
        x = x + linear(y.transpose(1, 2).flatten(2), f"{layer}.attn.out")
        x = x + linear(F.gelu(linear(norm(x, f"{layer}.ffn_norm"), f"{layer}.ffn.fc1")), f"{layer}.ffn.fc2")
    return linear(norm(x, "transformer.encoder.encoder_norm")[:, 0], "head")


def test_a_checkpoint_of_vit_pytorch_computes_what_vit_pytorch_computes(tiny_model, tiny_config, tmp_path):
    state = vit_pytorch_names(tiny_model)
    torch.save(state, tmp_path / "cifar10-100_500_checkpoint.bin")
    model = load(tmp_path / "cifar10-100_500_checkpoint.bin", config=tiny_config, dtype=torch.float64).eval()
    assert (model.config.gelu, model.config.norm_eps, model.config.mean) == ("erf", 1e-6, (0.5, 0.5, 0.5))
    x = images(model).double()
    expected = vit_pytorch_logits({name: value.double() for name, value in state.items()}, x, heads=2)
    assert (model(x) - expected).abs().max() < 1e-12
    assert (tiny_model.double()(x) - expected).abs().max() > 1e-8  # Google's GELU


def test_a_hybrid_of_vit_pytorch_is_refused_for_its_other_stem(tiny_model, tiny_config, tmp_path):
    state = vit_pytorch_names(tiny_model)
    state["transformer.embeddings.hybrid_model.root.conv.weight"] = torch.ones(64, 3, 7, 7)
    torch.save(state, tmp_path / "r50_checkpoint.bin")
    with pytest.raises(ValueError, match="is a hybrid of ViT-pytorch, whose ResNet stem .* computes something else"):
        load(tmp_path / "r50_checkpoint.bin", config=tiny_config)


# --- Errors ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("changes, message", [
    ({"blocks__0__norm1__weight": None}, r"missing 'blocks.0.norm1.weight'"),
    ({"blocks__0__attn__qkv__bias": None}, r"missing 'blocks.0.attn.qkv.bias'"),
    ({"blocks__0__norm1__num_batches_tracked": torch.ones(1)}, r"unknown 'blocks.0.norm1.num_batches_tracked'"),
    ({"fc_norm__weight": torch.ones(32)}, r"has a norm after the pooling \('fc_norm.weight'\), which Google's models"),
    ({"norm_pre__weight": torch.ones(32)}, r"has a norm before the blocks"),
    ({"blocks__1__ls1__gamma": torch.ones(32)}, r"has LayerScale \('blocks.1.ls1.gamma'\)"),
    ({"dist_token": torch.ones(32), "pos_embed": torch.ones(1, 18, 32)}, r"has a distillation token"),
    ({"reg_token": torch.ones(32)}, r"has register tokens"),
    ({"blocks__0__attn__q_norm__weight": torch.ones(32)}, r"has norms of queries and keys"),
    ({"head__weight": torch.ones(32, 5)}, r"'head.weight' has shape \(32, 5\), expected \(5, 32\)"),
    ({"patch_embed__proj__weight": torch.ones(32)}, r"no Vision Transformer .*expected tensors of its shapes"),
    ({"blocks__0__mlp__fc1__weight": torch.tensor(1.)}, r"no Vision Transformer .*expected tensors of its shapes"),
    ({"norm__bias": torch.full((32,), torch.nan)}, r"'norm.bias' holds values that are not finite"),
    ({"pos_embed": torch.ones(1, 16, 32)}, r"15 positions are no square grid.*Load it at its own size"),
    ({"patch_embed__proj__weight": None}, r"no Vision Transformer.*expected a tensor 'patch_embed.proj.weight'"),
    ({"pos_embed": None}, r"has no 'pos_embed'"),
])
def test_what_is_wrong_with_a_file_is_named(bare, tiny_config, changes, message):
    with pytest.raises(ValueError, match=message):
        load(changed(bare, **changes), config=tiny_config)


def test_a_grid_that_is_not_square_can_be_told(tiny_config, tmp_path):
    model = randomise(VisionTransformer(tiny_config, (16, 20), 5))
    save_file(model.state_dict(), tmp_path / "a.safetensors")
    assert same(load(tmp_path / "a.safetensors", img_size=(16, 20), config=tiny_config), model)


def test_two_tensors_for_one_parameter_are_refused(tiny_model, tiny_config, tmp_path):
    tensors = transformers_names(tiny_model) | {"layernorm.weight": torch.ones(32)}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="two tensors for one parameter: 'layernorm.weight' is 'norm.weight' here"):
        load(tmp_path / "a.safetensors", config=tiny_config)


def test_another_architecture_than_asked_for_is_refused(file):
    with pytest.raises(ValueError, match=r"not ViT-B_16: .*hidden_size 32 instead of 768"):
        load(file, config="ViT-B_16")


def test_a_rate_of_stochastic_depth_reaches_the_loaded_model(tmp_path, tiny_model, tiny_config):
    npz.save_npz(tiny_model, tmp_path / "tiny.npz")
    asked = replace(tiny_config, drop_path_rate=0.3, patch_proj="linear")
    config = load(tmp_path / "tiny.npz", config=asked).config
    assert (config.drop_path_rate, config.patch_proj, config.pos_embed) == (0.3, "linear", "learned")


def test_heads_are_not_guessed_for_a_structure_that_others_give_other_heads(tmp_path):
    with torch.device("meta"):
        model = VisionTransformer(replace(CONFIGS["ViT-CIFAR"], num_heads=3), 32, 10)
    zeros = {name: torch.zeros(value.shape) for name, value in model.state_dict().items()}
    save_file(zeros, tmp_path / "ti4.safetensors")
    with pytest.raises(ValueError, match="does not tell its number of attention heads"):
        load(tmp_path / "ti4.safetensors")
