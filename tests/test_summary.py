import re

import pytest
import torch
from torch import nn

from models import lora
from models.configs import CONFIGS, replace
from models.modeling import VisionTransformer
from tests.conftest import randomise
from utils import trainable
from utils.device import training_flops
from utils.summary import describe


def outline(name, size, classes=10, **changes):
    """A model without memory."""
    with torch.device("meta"):
        return VisionTransformer(replace(CONFIGS[name], **changes), size, classes)


def rows(text):
    """[(name, [its other columns])] of the table, names without the tree."""
    table = text.split("=\n")[1].split("\n=")[0]
    parts = [re.split(r"\s{2,}", re.sub(r"^[│├└─ ]*", "", line)) for line in table.splitlines()]
    return [(name, rest) for name, *rest in parts]


def first(text, name):
    return dict(reversed(rows(text)))[name]


def mflop(count):
    return f"{count / 1e6:,.3f}"


def by_hand(model):
    """FLOPs of one image: all matrix products, the last block for the first token where only that is read."""
    config, T = model.config, model.pos_embed.shape[1]
    D, M = config.hidden_size, config.mlp_dim
    queries = [T] * config.num_layers
    if config.classifier == "token":
        queries[-1] = 1
    blocks = sum(2 * (2 * T * D * D + Q * (2 * D * D + 2 * D * M) + 2 * Q * T * D) for Q in queries)
    patches = 2 * model.grid[0] * model.grid[1] * model.patch_embed.proj.weight.numel()
    return patches + blocks + 2 * D * model.num_classes


# --- ViT-B_16 --------------------------------------------------------------------------------------------------------

def test_a_learner_sees_patches_tokens_and_the_blocks_of_the_base_model():
    text = describe(outline("ViT-B_16", 224))
    assert first(text, "patch_embed (PatchEmbed)") == ["[1, 196, 768]", "590,592", "231.211"]
    assert first(text, "cls_token (put before the patches)") == ["[1, 197, 768]", "768", "-"]
    assert first(text, "pos_embed (added)") == ["[1, 197, 768]", "151,296", "-"]
    assert first(text, "qkv (Linear)") == ["[1, 197, 2304]", "1,771,776", mflop(2 * 197 * 3 * 768**2)]
    assert first(text, "softmax(q k') v") == ["[1, 12, 197, 64]", "-", mflop(4 * 197**2 * 768)]
    assert first(text, "fc1 (Linear)")[0] == first(text, "act (GELU)")[0] == "[1, 197, 3072]"
    assert first(text, "1 to 10 (each like 0)")[:2] == first(text, "0 (Block)")[:2] == ["[1, 197, 768]", "7,087,872"]
    assert first(text, "11 (Block)")[0] == first(text, "norm (LayerNorm)")[0] == "[1, 1, 768]"
    assert first(text, "head (Linear)") == ["[1, 10]", "7,690", "0.015"]
    assert "85,806,346; all of them train; 327 MiB of float32" in text and max(map(len, text.splitlines())) <= 120


def test_its_operations_are_the_well_known_ones_less_what_the_last_block_saves():
    model = outline("ViT-B_16", 224, 1000)
    text = describe(model)
    assert first(text, "VisionTransformer")[2] == mflop(by_hand(model))
    saved = training_flops(model) / 3 - by_hand(model)
    assert f"{saved / 1e9:.2f} GFLOP are saved" in text
    assert (by_hand(model) + saved) / 2 == pytest.approx(17.58e9, rel=2e-3)  # timm, with the norms
    assert "32.70 GFLOP = 16.35 G multiply-adds" in text


# --- Others ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, size, changes", [
    ("ViT-demo", (24, 40), {}), ("ViT-S_32-gap-norep", 64, {}), ("ViT-demo", 32, {"patch_proj": "linear"}),
    ("ViT-demo", 32, {"in_chans": 5, "mean": (0.5,) * 5, "std": (0.5,) * 5})])
@pytest.mark.parametrize("real", [False, True])
def test_operations_are_those_of_the_formula(name, size, changes, real):
    model = outline(name, size, 7, **changes)
    if real:  # then the CPU's own ways must not change the count
        model = randomise(model.to_empty(device="cpu"))
    text = describe(model)
    assert first(text, "VisionTransformer") == ["[1, 7]", f"{sum(p.numel() for p in model.parameters()):,}",
                                                mflop(by_hand(model))]
    assert ("last block" in text) == (model.config.classifier == "token")


def test_a_hybrid_shows_its_stem():
    model = outline("R50+ViT-B_16", (224, 160))
    text = describe(model)
    assert first(text, "backbone (ResNetStem)")[0] == "[1, 1024, 14, 10]"
    stem = float(first(text, "backbone (ResNetStem)")[2].replace(",", ""))
    root = 2 * 112 * 80 * 64 * 3 * 49
    assert first(text, "conv (StdConv2d)") == ["[1, 64, 112, 80]", "9,408", mflop(root)]
    assert float(first(text, "VisionTransformer")[2].replace(",", "")) == pytest.approx(stem + by_hand(model) / 1e6,
                                                                                        abs=1e-3)
    assert first(text, "2 to 8 (each like 1)")[1] == "1,117,184" and first(text, "2 (like 1)")[1] == "70,400"
    parts = [first(text, name)[2] for name in ("stem (Root)", "stages (ModuleList)")]
    assert sum(float(part.replace(",", "")) for part in parts) == pytest.approx(stem, abs=2e-3)


def test_without_a_head_and_with_one_before_it():
    assert first(describe(outline("ViT-demo", 32, 0)), "head (Identity)") == ["[1, 192]", "-", "-"]
    text = describe(outline("ViT-demo", 32, 5, representation_size=64))
    assert first(text, "fc (Linear)") == ["[1, 64]", "12,352", "0.025"]


def test_lora_shows_what_trains_and_counts_its_sums(tiny_model):
    plain = by_hand(tiny_model)
    lora.add(tiny_model, 3)
    text = describe(tiny_model)
    assert first(text, "qkv (LowRank)")[1:3] == [f"{3 * 32 * 33 + 18 * 32:,}", "576"]
    assert first(text, "VisionTransformer")[3] == mflop(plain + 2 * 8 * 32 * 32 * 3)  # two blocks
    assert "made once for a whole batch" in text


def test_frozen_blocks_are_told_apart():
    model = outline("ViT-demo", 32)
    trainable.choose(model, "last:3")
    text = describe(model)
    assert first(text, "0 (Block)")[2] == "-" and first(text, "1 to 2 (each like 0)")[2] == "-"
    assert first(text, "3 (Block)")[2] == first(text, "4 (like 3)")[2] == first(text, "3 (Block)")[1]
    assert "1,336,906 of them train" in text


def test_half_precision_is_said():
    assert "of bfloat16" in describe(outline("ViT-demo", 32).bfloat16())


# --- What it leaves --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_as_it_was(tiny_model, training):
    tiny_model.train(training)
    tiny_model.head.eval()
    weights = {name: p.clone() for name, p in tiny_model.state_dict().items()}
    modes = [module.training for module in tiny_model.modules()]
    assert describe(tiny_model) == describe(tiny_model)
    assert [module.training for module in tiny_model.modules()] == modes
    assert all(torch.equal(weights[name], p) for name, p in tiny_model.state_dict().items())
    for module in tiny_model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
    assert all(p.grad is None for p in tiny_model.parameters())


def test_the_largest_model_needs_no_memory():
    text = describe(outline("ViT-H_14", 224))  # nothing can be computed with it
    assert first(text, "1 to 30 (each like 0)")[0] == "[1, 257, 1280]" and "2.35 GiB of float32" in text


def test_of_a_model_with_weights_only_a_copy_without_them_is_called(tiny_model):
    called = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: called.append(module))
    describe(tiny_model)
    handle.remove()
    assert called and not {*called} & {*tiny_model.modules()}
    assert all(p.is_meta for module in called for p in module.parameters())
