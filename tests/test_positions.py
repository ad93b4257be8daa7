"""Position embeddings by formula: against the formulas written out, in files, in timm, and in training."""

import logging
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from models.configs import replace
from models.embedding import position_similarity
from models.exchange import load, save
from models.fill import resize_pos_embed
from models.modeling import VisionTransformer
from models.npz import load_npz, save_npz
from models.positions import sincos1d, sincos2d
from tests.conftest import randomise
from utils.optim import make_optimizer
from utils.step import make_scaler, train_step

FIXED = ["sincos1d", "sincos2d", "none"]


def line(tokens, D):
    table = np.empty((tokens, D))
    for p in range(tokens):
        for i in range(D // 2):
            table[p, 2 * i] = math.sin(p / 10000 ** (2 * i / D))
            table[p, 2 * i + 1] = math.cos(p / 10000 ** (2 * i / D))
    return table


def plane(rows, columns, D):
    table, quarter = np.empty((rows * columns, D)), D // 4
    for y in range(rows):
        for x in range(columns):
            for k in range(quarter):
                omega = 1 / 10000 ** (k / (quarter - 1))
                table[y * columns + x, k] = math.sin(x * omega)
                table[y * columns + x, quarter + k] = math.cos(x * omega)
                table[y * columns + x, 2 * quarter + k] = math.sin(y * omega)
                table[y * columns + x, 3 * quarter + k] = math.cos(y * omega)
    return table


def expected(kind, classifier, grid, D):
    token = int(classifier == "token")
    if kind == "sincos1d":
        return line(token + grid[0] * grid[1], D)
    table = plane(*grid, D) if kind == "sincos2d" else np.zeros((grid[0] * grid[1], D))
    return np.concatenate([np.zeros((token, D)), table])


def trained(config, size=16):
    """A model in which everything but its fixed position embedding is random."""
    model = VisionTransformer(config, size, 5)
    positions = model.pos_embed.detach().clone()
    randomise(model)
    with torch.no_grad():
        model.pos_embed.copy_(positions)
    return model


# --- The formulas ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("tokens, D", [(1, 2), (65, 192), (577, 48)])
def test_on_a_line_they_are_those_of_vaswani(tokens, D):
    found = sincos1d(tokens, D)
    assert found.dtype == torch.float32 and np.abs(found.numpy() - line(tokens, D)).max() < 6e-8  # half a float32 step


@pytest.mark.parametrize("grid, D", [((1, 1), 8), ((8, 8), 192), ((3, 7), 32), ((24, 2), 64)])
def test_on_a_plane_they_are_those_of_big_vision(grid, D):
    found = sincos2d(grid, D)
    assert found.dtype == torch.float32 and np.abs(found.numpy() - plane(*grid, D)).max() < 6e-8


@pytest.mark.parametrize("classifier", ["token", "gap"])
@pytest.mark.parametrize("kind", FIXED)
def test_a_new_model_has_them_and_the_rest_is_drawn_as_ever(tiny_config, kind, classifier):
    config = replace(tiny_config, pos_embed=kind, classifier=classifier)
    model = VisionTransformer(config, (16, 24), 5)
    assert np.abs(model.pos_embed[0].detach().numpy() - expected(kind, classifier, (4, 6), 32)).max() < 6e-8
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["pos_embed"]
    assert model.blocks[0].attn.qkv.weight.std() > 0


def test_a_width_that_does_not_divide_is_refused(tiny_config):
    with pytest.raises(ValueError, match="sincos1d is for an even width, and this one is 33."):
        VisionTransformer(replace(tiny_config, pos_embed="sincos1d", hidden_size=33, num_heads=3), 16, 5)
    for width in (30, 4):
        with pytest.raises(ValueError, match=f"sincos2d is for .* multiple of 4, 8 at least, and this one is {width}."):
            VisionTransformer(replace(tiny_config, pos_embed="sincos2d", hidden_size=width), 16, 5)


def test_without_positions_the_order_of_the_patches_does_not_matter(tiny_config):
    model = trained(replace(tiny_config, pos_embed="none")).double()
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    mixed = torch.cat([x[:, :, 8:], x[:, :, :8]], dim=2)
    assert torch.count_nonzero(model.pos_embed) == 0 and torch.count_nonzero(position_similarity(model)) == 0
    assert torch.allclose(model(x), model(mixed), rtol=0, atol=1e-12)


# --- In training -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", FIXED)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_an_update_leaves_them_alone(tiny_config, kind, optimizer):
    model = trained(replace(tiny_config, pos_embed=kind)).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    made = make_optimizer(model, optimizer, weight_decay=0.1)
    assert not any(p is model.pos_embed for group in made.param_groups for p in group["params"])
    x, y = torch.randn(8, 3, 16, 16), torch.arange(8) % 5
    F.cross_entropy(model(x), y).backward()
    assert model.pos_embed.grad is None
    for step in range(2):
        train_step(model, made, make_scaler("cpu", torch.float32), x, y, lr=0.1, dropout_seed=(0, step))
    assert [name for name, p in model.named_parameters() if torch.equal(p, before[name])] == ["pos_embed"]


# --- In files --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", FIXED)
def test_a_file_brings_them_back_frozen(tiny_config, tmp_path, kind):
    model = trained(replace(tiny_config, pos_embed=kind, patch_proj="linear", drop_path_rate=0.2))
    save(model, tmp_path / "a.safetensors", {})
    again = load(tmp_path / "a.safetensors", num_classes=3)
    assert again.config == model.config and torch.equal(again.pos_embed, model.pos_embed)
    assert [name for name, p in again.named_parameters() if not p.requires_grad] == ["pos_embed"]


def test_at_another_size_they_are_interpolated_as_learned_ones_are_and_stay_frozen(tiny_config, tmp_path, caplog):
    model = trained(replace(tiny_config, pos_embed="sincos2d"))
    save(model, tmp_path / "a.safetensors", {})
    with caplog.at_level(logging.INFO):
        again = load(tmp_path / "a.safetensors", img_size=(24, 32))
    assert "Position embedding resized from 4 x 4 to 6 x 8" in caplog.text
    assert torch.equal(again.pos_embed, resize_pos_embed(model.pos_embed.detach(), (4, 4), (6, 8)).float())
    assert not again.pos_embed.requires_grad and again.cls_token.requires_grad


def test_an_npz_keeps_the_function(tiny_config, tmp_path):
    """It has no place for the words: read again, the embedding is one like any other."""
    model = trained(replace(tiny_config, pos_embed="sincos2d", patch_proj="linear"))
    save_npz(model, tmp_path / "a.npz")
    again, x = load_npz(tmp_path / "a.npz").eval(), torch.randn(2, 3, 16, 16)
    assert torch.allclose(again(x), model(x), rtol=0, atol=1e-5)
    assert again.pos_embed.requires_grad and again.config.pos_embed == "learned"


@pytest.mark.parametrize("classifier", ["token", "gap"])
@pytest.mark.parametrize("kind", FIXED)
def test_timm_loads_the_file_strictly_and_computes_the_same(tiny_config, tmp_path, kind, classifier):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    model = trained(replace(tiny_config, pos_embed=kind, patch_proj="linear", classifier=classifier))
    save(model, tmp_path / "a.safetensors", {})
    pooling = {"global_pool": "token"} if classifier == "token" else {
        "global_pool": "avg", "class_token": False, "fc_norm": False}
    theirs = timm.models.VisionTransformer(
        img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2, mlp_ratio=2, num_classes=5, **pooling,
        act_layer=lambda: torch.nn.GELU(approximate="tanh"),
        norm_layer=lambda width, **_: torch.nn.LayerNorm(width, eps=1e-6))
    theirs.load_state_dict(load_file(tmp_path / "a.safetensors"), strict=True)
    x = torch.randn(3, 3, 16, 16)
    torch.testing.assert_close(model(x), theirs.eval()(x), atol=1e-5, rtol=1e-5)
