"""Attention maps: what is recorded is softmax(q k' / sqrt(d)) of the very model; what is made of it, what is said."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from models import attention
from models.configs import CONFIGS, replace
from models.modeling import VisionTransformer
from tests.conftest import randomise
from utils.optim import make_optimizer
from utils.step import make_scaler, train_step

SIZE = (16, 24)


def made(tiny_config, kind):
    """A random model of each kind: plain, of mean pooling, and a hybrid (root alone) of half the patch."""
    resnet = {"num_layers": (), "width_factor": 0.5}
    config = {"token": tiny_config, "gap": replace(tiny_config, classifier="gap"),
              "hybrid": replace(tiny_config, resnet=resnet, patch_size=(1, 1))}[kind]
    return randomise(VisionTransformer(config, SIZE, 5))


def explicit(model, images):
    """Each layer's map, and what enters the layer, from a forward pass written out with float64."""
    model = model.double()
    x = model.patch_embed(images.double())
    if model.config.classifier == "token":
        x = torch.cat([model.cls_token.expand(len(x), -1, -1), x], dim=1)
    x, maps = x + model.pos_embed, []
    for block in model.blocks:
        q, k, v = block.attn.qkv(block.norm1(x)).unflatten(2, (3, model.config.num_heads, -1)).permute(2, 0, 3, 1, 4)
        maps.append((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1))
        x = x + block.attn.proj((maps[-1] @ v).transpose(1, 2).flatten(2))
        x = x + block.mlp(block.norm2(x))
    model.float()
    return [m.detach() for m in maps]


@pytest.mark.parametrize("kind", ["token", "gap", "hybrid"])
def test_maps_are_the_softmax_of_scaled_products_and_their_rows_sum_to_one(tiny_config, kind):
    model, images = made(tiny_config, kind), torch.randn(2, 3, *SIZE)
    maps = attention.attention_maps(model, images)
    assert len(maps) == 2
    for found, expected in zip(maps, explicit(model, images)):
        assert found.dtype == torch.float32 and (found - expected).abs().max() < 1e-5
        assert (found.sum(-1) - 1).abs().max() < 1e-5
    (last,) = attention.attention_maps(model, images, layers=[-1], dtype=torch.float16)
    assert last.dtype == torch.float16 and (last - maps[1]).abs().max() < 1e-3


def test_recording_changes_no_logit_and_leaves_nothing_behind(tiny_model):
    images, seen = torch.randn(3, 3, 16, 16), []
    before = tiny_model(images)
    with attention.recording(tiny_model, lambda layer, found: seen.append((layer, tuple(found.shape))), [1]):
        assert torch.equal(tiny_model(images), before)
    assert seen == [(1, (3, 2, 17, 17))]
    with pytest.raises(ZeroDivisionError), attention.recording(tiny_model, lambda *_: 1 / 0):
        tiny_model(images)
    assert not any(module._forward_pre_hooks for module in tiny_model.modules())
    tiny_model.train()
    attention.class_rollout(tiny_model, images, torch.tensor([0, 1, 2]))
    attention.rollout(tiny_model, images)
    assert tiny_model.training and all(p.grad is None for p in tiny_model.parameters())
    assert not any(module._forward_pre_hooks for module in tiny_model.modules())


def test_maps_of_reduced_precision_are_computed_in_full(tiny_model):
    images = torch.randn(1, 3, 16, 16)
    expected = attention.attention_maps(tiny_model, images)
    found = []
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16), \
            attention.recording(tiny_model, lambda _, attention: found.append(attention)):
        tiny_model(images)
    assert all((one - other).abs().max() < 0.02 and (one.sum(-1) - 1).abs().max() < 1e-5
               for one, other in zip(found, expected))


def test_a_compiled_model_is_looked_at_too(tiny_model):
    images = torch.randn(1, 3, 16, 16)
    expected = attention.attention_maps(tiny_model, images)
    for block in tiny_model.blocks:
        block.compile(backend="eager")
    with torch.no_grad():
        tiny_model(images)
    found = attention.attention_maps(tiny_model, images)
    assert len(found) == 2 and all(map(torch.equal, found, expected))


@pytest.mark.parametrize("heads", ["mean", "max"])
@pytest.mark.parametrize("kind", ["token", "gap", "hybrid"])
def test_rollout_is_the_papers_ten_lines(tiny_config, kind, heads):
    model, images = made(tiny_config, kind), torch.randn(2, 3, *SIZE)
    found = attention.rollout(model, images, heads)
    for b in range(2):
        product = np.eye(explicit(model, images)[0].shape[-1])
        for layer in explicit(model, images):
            matrix = layer[b].numpy()
            matrix = matrix.mean(0) if heads == "mean" else matrix.max(0)
            matrix = matrix + np.eye(len(matrix))
            product = matrix / matrix.sum(1, keepdims=True) @ product
        row = product.mean(0) if kind == "gap" else product[0, 1:]
        assert found[b].shape == model.grid and np.abs(found[b].flatten().numpy() - row).max() < 1e-5


@pytest.mark.parametrize("kind", ["token", "gap", "hybrid"])
def test_class_rollout_takes_the_gradient_of_each_map(tiny_config, kind):
    """Chefer et al.'s equations 5 and 6, with maps that are differentiated themselves."""
    model, images, classes = made(tiny_config, kind), torch.randn(2, 3, *SIZE), torch.tensor([3, 0])
    found = attention.class_rollout(model.requires_grad_(False), images, classes)
    model = model.double()
    for b, c in enumerate(classes):
        x = model.patch_embed(images[b:b + 1].double())
        if kind != "gap":
            x = torch.cat([model.cls_token, x], dim=1)
        x, maps = x + model.pos_embed, []
        for block in model.blocks:
            q, k, v = block.attn.qkv(block.norm1(x)).unflatten(2, (3, 2, 16)).permute(2, 0, 3, 1, 4)
            maps.append((q @ k.mT / 4).softmax(-1).requires_grad_())
            x = x + block.attn.proj((maps[-1] @ v).transpose(1, 2).flatten(2))
            x = x + block.mlp(block.norm2(x))
        x = model.norm(x)
        gradients = torch.autograd.grad(model.head(x.mean(1) if kind == "gap" else x[:, 0])[0, c], maps)
        product = torch.eye(x.shape[1], dtype=torch.float64)
        for one, gradient in zip(maps, gradients):
            product = product + (one * gradient).clamp(min=0).mean(1)[0] @ product
        row = product.mean(0) if kind == "gap" else product[0, 1:]
        assert (found[b].flatten() - row).abs().max() < 1e-5 * row.max()


@pytest.mark.parametrize("kind", ["token", "gap"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_models_of_other_types_are_looked_at_too(tiny_config, kind, dtype):
    model, images, classes = made(tiny_config, kind), torch.randn(1, 3, *SIZE), torch.tensor([1])
    exact = [attention.rollout(model, images), attention.class_rollout(model, images, classes),
             attention.attention_distance(model, images)]
    model, images = model.to(dtype), images.to(dtype)
    found = [attention.rollout(model, images), attention.class_rollout(model, images, classes),
             attention.attention_distance(model, images)]
    for one, other in zip(found, exact):
        assert one.dtype == torch.promote_types(dtype, torch.float32) and (one - other).abs().max() < 0.1 * other.max()


def test_modules_come_back_in_the_mode_in_which_each_was(tiny_model):
    tiny_model.train().blocks[0].eval()
    attention.rollout(tiny_model, torch.randn(1, 3, 16, 16))
    assert tiny_model.training and tiny_model.blocks[1].attn.training and not tiny_model.blocks[0].mlp.training


def test_attention_distance_is_the_weighted_mean_of_pixels(tiny_config):
    model, images = made(tiny_config, "token"), torch.randn(2, 3, *SIZE)
    assert attention.patch_distances(model)[0].tolist() == pytest.approx(
        [4 * np.hypot(i, j) for i in range(4) for j in range(6)])
    found = attention.attention_distance(model, images)
    maps = explicit(model, images)
    for layer in range(2):
        for head in range(2):
            total = 0
            for b in range(2):
                for i in range(24):
                    row = maps[layer][b, head, 1 + i, 1:]
                    total += sum(row[j] / row.sum() * 4 * np.hypot(i // 6 - j // 6, i % 6 - j % 6) for j in range(24))
            assert found[layer, head].item() == pytest.approx(total.item() / 48, rel=1e-5)


def test_of_a_hybrid_a_patch_is_as_many_pixels_as_the_stem_takes(tiny_config):
    distances = attention.patch_distances(made(tiny_config, "hybrid"))
    assert distances.shape == (24, 24) and distances[0, 1] == 4 and distances[0, 6] == 4


MEASURE = """
import resource, torch
from models.attention import attention_maps, recording
from models.configs import CONFIGS
from models.modeling import VisionTransformer
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
torch.set_num_threads(2)
told, images = [peak()], torch.zeros(1, 3, 384, 384)
model = VisionTransformer(CONFIGS["ViT-B_16"], 384, 10).eval()
with torch.no_grad(), recording(model, lambda *_: None):   # and what the libraries need once
    model(images)
told.append(peak())
maps = attention_maps(model, images)
assert [tuple(m.shape) for m in maps] == [(1, 12, 577, 577)] * 12
print(*told, peak())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory as Linux counts it")
def test_all_maps_of_vit_b_16_at_384_px_stay_below_a_gigabyte():
    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True)
    libraries, before, peak = map(float, done.stdout.split())
    maps = 12 * 12 * 577**2 * 4 / 2**20                    # 183 MiB
    assert peak - before < maps + 32                       # one layer's scratch beside them
    assert peak - libraries < 1024                         # model and all


def quadrants(count, seed):
    """Images (count, 3, 32, 32) with rows or columns of stripes in each quadrant; the label is the upper left one's."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, 32, 32, generator=generator) * 0.3
    kinds = torch.randint(2, (count, 4), generator=generator)
    stripes = torch.arange(16) // 2 % 2 * 2.0 - 1
    for i, (row, column) in enumerate([(0, 0), (0, 16), (16, 0), (16, 16)]):
        images[:, :, row:row + 16, column:column + 16] += torch.where(
            kinds[:, i, None, None, None] == 1, stripes[:, None], stripes[None, :])
    return images, kinds[:, 0]


def test_a_model_that_needs_one_quadrant_attends_there(tiny_config):
    torch.manual_seed(0)
    model = VisionTransformer(tiny_config, 32, 2)
    optimizer, scaler = make_optimizer(model.train(), "adamw"), make_scaler("cpu", torch.float32)
    for step in range(150):
        train_step(model, optimizer, scaler, *quadrants(64, step), lr=3e-3 * min(1, step / 20))
    images, labels = quadrants(64, 10**6)
    assert (model.eval()(images).argmax(1) == labels).float().mean() > 0.98
    for found, least in ((attention.rollout(model, images), 0.6),
                         (attention.class_rollout(model, images, labels), 0.5)):
        low, high = found.amin((1, 2), keepdim=True), found.amax((1, 2), keepdim=True)
        scaled = (found - low) / (high - low)
        assert (scaled[:, :4, :4].sum((1, 2)) / scaled.sum((1, 2))).mean() > least  # a quarter, if it looked everywhere


def test_patch_size_of_published_models_gives_the_known_distances():
    model = VisionTransformer(replace(CONFIGS["ViT-demo"], patch_size=(16, 16)), 224, 0)
    distances = attention.patch_distances(model)
    assert distances.shape == (196, 196) and distances.max().item() == pytest.approx(13 * 16 * 2**0.5)
