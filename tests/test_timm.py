"""timm and this toolkit read each other's files. A peer is a test oracle: it is not needed to use the toolkit."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.configs import CONFIGS, replace
from models.exchange import load, save
from models.modeling import VisionTransformer
from tests.conftest import randomise
from tests.test_exchange import images

timm = pytest.importorskip("timm", reason="timm is not installed")

# Every variant that timm has of what Google published, and its name there.
VARIANTS = {
    "vit_tiny_patch16": "ViT-Ti_16", "vit_small_patch16": "ViT-S_16", "vit_small_patch32": "ViT-S_32",
    "vit_base_patch8": "ViT-B_8", "vit_base_patch16": "ViT-B_16", "vit_base_patch32": "ViT-B_32",
    "vit_large_patch16": "ViT-L_16", "vit_large_patch32": "ViT-L_32", "vit_huge_patch14": "ViT-H_14",
    "vit_tiny_r_s16_p8": "R+ViT-Ti_16", "vit_small_r26_s32": "R26+ViT-S_32", "vit_base_r26_s32": "R26+ViT-B_32",
    "vit_base_r50_s16": "R50+ViT-B_16", "vit_large_r50_s32": "R50+ViT-L_32",
}


def test_timm_still_has_every_variant():
    assert {name.rpartition("_")[0] for name in timm.list_models()} >= set(VARIANTS)


@pytest.mark.parametrize("name", sorted({f"{name}_{size}" for name in VARIANTS for size in (224, 384)}
                                        & set(timm.list_models())))
def test_names_and_shapes_are_timms_for_every_variant(name):
    stem, _, size = name.rpartition("_")
    with torch.device("meta"):
        theirs = timm.create_model(name, num_classes=10)
        ours = VisionTransformer(CONFIGS[VARIANTS[stem]], int(size), 10)
    shapes = [{key: tuple(value.shape) for key, value in model.state_dict().items()} for model in (ours, theirs)]
    assert shapes[0] == shapes[1]
    left_over = theirs.load_state_dict(ours.state_dict(), strict=True, assign=True)
    assert not left_over.missing_keys and not left_over.unexpected_keys


def trained(name, size):
    """A model with Google's initial values, and what these leave at zero or one moved away from there."""
    torch.manual_seed(0)
    model = VisionTransformer(CONFIGS[VARIANTS[name]], size, 10)
    with torch.no_grad():
        for key, value in model.named_parameters():
            if key.endswith("norm3.weight"):
                value.fill_(1)
            if value.ndim == 1 or key.startswith("head"):
                value.add_(torch.randn(value.shape) * 0.1)
    return model.eval()


def in_timm(model, name, path):
    """timm's model with the weights of a file of ours, with what a user of timm must set: the GELU."""
    save(model, path, {})
    theirs = timm.create_model(f"{name}_224", img_size=model.img_size, num_classes=10, act_layer="gelu_tanh")
    theirs.load_state_dict(load_file(path), strict=True)
    return theirs.eval()


@torch.no_grad()
def difference(a, b, x):
    """Of the logits, relative to the largest."""
    return ((a(x) - b(x)).abs().max() / a(x).abs().max()).item()


@pytest.mark.parametrize("name, size", [("vit_tiny_patch16", 64), ("vit_small_patch32", (64, 96))])
def test_a_saved_file_gives_timm_the_same_logits(tmp_path, name, size):
    model = trained(name, size)
    theirs = in_timm(model, name, tmp_path / "a.safetensors")
    assert difference(model, theirs, images(model)) < 1e-5


@pytest.mark.parametrize("name, least, most", [("vit_tiny_r_s16_p8", 1e-6, 1e-4), ("vit_small_r26_s32", 2e-5, 2e-3)])
def test_a_hybrid_differs_in_timm_by_its_standardisation_alone(tmp_path, name, least, most):
    model = trained(name, 64)
    theirs = in_timm(model, name, tmp_path / "a.safetensors")
    assert least < difference(model, theirs, images(model)) < most
    for net in (model, theirs):  # epsilons (Google: std + 1e-5, timm: sqrt(var + 1e-8)) vanish beside large kernels
        for key, value in net.named_parameters():
            if "backbone" in key and value.ndim == 4:
                value.data *= 1e4
    assert difference(model, theirs, images(model)) < 1e-5


def timm_tiny(**arguments):
    return timm.models.VisionTransformer(
        img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2, mlp_ratio=2, num_classes=5,
        act_layer=lambda: torch.nn.GELU(approximate="tanh"),
        norm_layer=lambda width, **_: torch.nn.LayerNorm(width, eps=1e-6), **arguments)


@pytest.mark.parametrize("pooling", ["token", "gap"])
def test_timm_and_ours_load_each_others_files_strictly_with_equal_logits(tiny_config, tmp_path, pooling):
    theirs = randomise(timm_tiny(global_pool="token") if pooling == "token" else
                       timm_tiny(global_pool="avg", class_token=False, fc_norm=False))
    save_file(theirs.state_dict(), tmp_path / "timm.safetensors")
    config = replace(tiny_config, classifier=pooling)
    ours = load(tmp_path / "timm.safetensors", config=config).eval()
    x = images(ours)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)

    save(randomise(ours, seed=1), tmp_path / "ours.safetensors", {})
    theirs.load_state_dict(load_file(tmp_path / "ours.safetensors"), strict=True)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name, timms", [("R+ViT-Ti_16", "vit_tiny_r_s16_p8_224"),
                                         ("R26+ViT-S_32", "vit_small_r26_s32_224")])
def test_a_hybrid_of_timms_is_known_by_its_names(tmp_path, name, timms):
    with torch.device("meta"):
        theirs = timm.create_model(timms, num_classes=3)
    theirs.to_empty(device="cpu").load_state_dict({k: torch.zeros(v.shape) for k, v in theirs.state_dict().items()})
    save_file(theirs.state_dict(), tmp_path / "hybrid.safetensors")
    ours = load(tmp_path / "hybrid.safetensors")
    assert ours.config == CONFIGS[name]
    theirs.load_state_dict(ours.state_dict(), strict=True)
