import math

import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import stochastic_depth

from models.configs import CONFIGS, replace
from models.modeling import VisionTransformer, grid_size
from tests.conftest import randomise
from utils.step import seed_dropout


def test_forward_is_the_papers_equations(tiny_model):
    """Dosovitskiy et al. 2021, equations 1 to 4, written out with einsum and our parameters by name."""
    model, w = tiny_model.double(), dict(tiny_model.double().named_parameters())
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)

    def norm(x, name):
        x = x - x.mean(-1, keepdim=True)
        return x / torch.sqrt((x**2).mean(-1, keepdim=True) + 1e-6) * w[f"{name}.weight"] + w[f"{name}.bias"]

    def dense(x, name):
        return torch.einsum("btd,ed->bte", x, w[f"{name}.weight"]) + w[f"{name}.bias"]

    patches = images.reshape(2, 3, 4, 4, 4, 4).permute(0, 2, 4, 1, 3, 5).reshape(2, 16, 48)
    x = patches @ w["patch_embed.proj.weight"].reshape(32, 48).T + w["patch_embed.proj.bias"]
    x = torch.cat([w["cls_token"].expand(2, 1, 32), x], 1) + w["pos_embed"]
    for i in range(2):
        q, k, v = dense(norm(x, f"blocks.{i}.norm1"), f"blocks.{i}.attn.qkv").reshape(2, 17, 3, 2, 16).unbind(2)
        attention = torch.softmax(torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(16), -1)
        x = x + dense(torch.einsum("bhqk,bkhd->bqhd", attention, v).reshape(2, 17, 32), f"blocks.{i}.attn.proj")
        y = dense(norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.fc1")
        y = 0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
        x = x + dense(y, f"blocks.{i}.mlp.fc2")
    logits = norm(x, "norm")[:, 0] @ w["head.weight"].T + w["head.bias"]
    assert torch.allclose(model(images), logits, rtol=0, atol=1e-12)


def test_mean_pooling_has_no_class_token_and_averages_the_tokens(tiny_config):
    model = randomise(VisionTransformer(replace(tiny_config, classifier="gap"), (16, 24), 5))
    images = torch.randn(2, 3, 16, 24)
    assert not hasattr(model, "cls_token") and model.pos_embed.shape == (1, 24, 32)
    assert torch.allclose(model(images), model.head(model.forward_features(images).mean(1)), atol=1e-6)


def test_pre_logits_is_a_dense_layer_with_tanh_before_the_head(tiny_config):
    model = randomise(VisionTransformer(replace(tiny_config, representation_size=20), 16, 5))
    images = torch.randn(2, 3, 16, 16)
    dense = model.pre_logits.fc
    hidden = torch.tanh(F.linear(model.forward_features(images)[:, 0], dense.weight, dense.bias))
    assert torch.allclose(model(images), model.head(hidden), atol=1e-6)


def test_a_new_model_gives_equal_logits_and_the_first_gradient_reaches_only_the_head(tiny_config):
    model = VisionTransformer(tiny_config, 16, 5)
    logits = model(torch.randn(3, 3, 16, 16))
    assert torch.count_nonzero(logits) == 0
    F.cross_entropy(logits, torch.tensor([0, 1, 2])).backward()
    reached = {name for name, p in model.named_parameters() if torch.count_nonzero(p.grad)}
    assert reached == {"head.weight", "head.bias"}


def test_initial_values_are_those_of_google(tiny_config):
    torch.manual_seed(0)
    model = VisionTransformer(replace(tiny_config, hidden_size=128, num_heads=2, mlp_dim=512), 64, 5)
    assert torch.count_nonzero(model.cls_token) == 0 and torch.count_nonzero(model.blocks[0].attn.qkv.bias) == 0
    assert model.pos_embed.std().item() == pytest.approx(0.02, rel=0.02)
    bound = math.sqrt(6 / (128 + 128))  # Xavier uniform of each D x D kernel, not of the fused one
    for kernel in model.blocks[0].attn.qkv.weight.chunk(3):
        assert 0.98 * bound < kernel.abs().max().item() <= bound
    bound = math.sqrt(6 / (128 + 512))
    assert 0.98 * bound < model.blocks[0].mlp.fc1.weight.abs().max().item() <= bound
    assert 0 < model.blocks[0].mlp.fc1.bias.abs().max().item() < 1e-5
    assert model.patch_embed.proj.weight.std().item() == pytest.approx(1 / math.sqrt(48), rel=0.05)


def test_dropout_acts_in_the_four_places_of_google(tiny_config):
    """After the position embedding, after attention, after GELU, after the second dense layer."""
    model = VisionTransformer(replace(tiny_config, dropout_rate=0.5), 16, 5)
    rates = [module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    assert rates == [0.5] * (1 + 2 * 2)  # a block's `drop` acts in two of its three places
    randomise(model)
    images = torch.randn(1, 3, 16, 16)
    assert torch.equal(model(images), model(images))
    model.train()
    assert not torch.equal(model(images), model(images))


def test_the_remainder_at_the_bottom_and_right_is_dropped(tiny_config):
    model, larger = (randomise(VisionTransformer(tiny_config, size, 5)) for size in (16, (18, 19)))
    images = torch.randn(2, 3, 18, 19)
    assert torch.allclose(larger(images), model(images[..., :16, :16]), atol=1e-6)


@pytest.mark.parametrize("name, size, grid", [("ViT-B_16", (224, 320), (14, 20)), ("R50+ViT-B_16", (71, 55), (5, 4)),
                                              ("R+ViT-Ti_16", (71, 85), (2, 2)), ("R50+ViT-L_32", (224, 224), (7, 7))])
def test_grid_of_a_hybrid_rounds_up_in_the_stem_and_down_in_the_patches(name, size, grid):
    assert grid_size(CONFIGS[name], size) == grid


def test_images_of_another_size_are_refused_with_both_sizes(tiny_model):
    with pytest.raises(ValueError, match=r"\(B, 3, 16, 16\).*\(1, 3, 20, 20\)"):
        tiny_model(torch.zeros(1, 3, 20, 20))


def test_images_smaller_than_a_patch_are_refused():
    with pytest.raises(ValueError, match="8 x 8 pixels are smaller than one patch of ViT-B_16"):
        VisionTransformer(CONFIGS["ViT-B_16"], 8, 2)


def test_parameters_are_named_as_timm_names_them():
    timm = pytest.importorskip("timm", reason="timm is not installed")
    for ours, theirs in (("ViT-Ti_16", "vit_tiny_patch16_224"), ("R26+ViT-S_32", "vit_small_r26_s32_224"),
                         ("R+ViT-Ti_16", "vit_tiny_r_s16_p8_224")):
        with torch.device("meta"):
            model = VisionTransformer(CONFIGS[ours], 224, 1000)
            peer = timm.create_model(theirs)
        shapes = {name: p.shape for name, p in peer.state_dict().items()}
        assert {name: p.shape for name, p in model.state_dict().items()} == shapes


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_last_block_computes_only_the_row_that_the_head_reads(tiny_config, dropout):
    model = randomise(VisionTransformer(replace(tiny_config, dropout_rate=dropout), 16, 5)).double()
    images = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    rows = []
    model.blocks[-1].mlp.register_forward_hook(lambda module, inputs, output: rows.append(output.shape[1]))
    logits = model(images)
    whole = model.head(model.forward_features(images)[:, 0])
    assert rows == [1, 17] and torch.allclose(logits, whole, rtol=0, atol=1e-12)
    ours, all_rows = (torch.autograd.grad(out[:, 2].sum(), list(model.parameters())) for out in (logits, whole))
    for one, other in zip(ours, all_rows):
        assert torch.allclose(one, other, rtol=0, atol=1e-12)


def test_checkpointed_blocks_give_the_same_gradients_to_the_bit(tiny_config):
    model = randomise(VisionTransformer(replace(tiny_config, dropout_rate=0.3), 16, 5)).train()
    images, gradients, kept = torch.randn(3, 3, 16, 16), [], []
    for again in (False, True):
        model.gradient_checkpointing = again
        torch.manual_seed(1)  # dropout's masks are those of the first pass
        size = 0

        def count(tensor):
            nonlocal size
            size += tensor.numel()
            return tensor
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss = F.cross_entropy(model(images), torch.tensor([0, 1, 2]))
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
        kept.append(size)
    assert all(torch.equal(one, other) for one, other in zip(*gradients))
    assert kept[1] < kept[0] / 3


# --- Patches as one matrix product -----------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("change, size", [
    ({}, (16, 16)), ({}, (18, 27)), ({"patch_size": (4, 3)}, (18, 19)), ({"in_chans": 1, "patch_size": (2, 5)}, 11),
    ({"in_chans": 6, "mean": (0.5,) * 6, "std": (0.5,) * 6}, (16, 24)),
    ({"patch_size": (2, 1), "resnet": {"num_layers": (1,), "width_factor": 0.5}}, (41, 22)),
    ({"patch_size": (2, 2), "resnet": {"num_layers": (), "width_factor": 0.5}}, 37)])
def test_linear_and_convolutional_patches_are_one_function(tiny_config, change, size, dtype, tolerance):
    """Values and all gradients, those of the pixels included; what is left over at the edges has none."""
    config = replace(tiny_config, **change)
    conv = randomise(VisionTransformer(config, size, 5)).to(dtype)
    linear = VisionTransformer(replace(config, patch_proj="linear"), size, 5).to(dtype).eval()
    linear.load_state_dict(conv.state_dict(), strict=True)
    images = torch.randn(2, config.in_chans, *conv.img_size, dtype=dtype)
    found = []
    for model in (conv, linear):
        x = images.clone().requires_grad_()
        embedded = model.patch_embed(x)
        weight = torch.linspace(-1, 1, embedded.numel(), dtype=dtype).reshape(embedded.shape)
        gradients = torch.autograd.grad((embedded * weight).sum(), [x, *model.patch_embed.parameters()])
        found.append([embedded, *gradients, model(images)])
    for one, other in zip(*found):
        scale = max(1.0, one.abs().max().item())
        assert one.shape == other.shape and (one - other).abs().max().item() <= tolerance * scale


# --- Stochastic depth ------------------------------------------------------------------------------------------------

def deep(config, rate, layers=4, **changes):
    config = replace(config, drop_path_rate=rate, num_layers=layers, **changes)
    return randomise(VisionTransformer(config, 16, 5)).train()


def test_stochastic_depth_draws_and_computes_what_torchvisions_does(tiny_config):
    model, images = deep(tiny_config, 0.6), torch.randn(6, 3, 16, 16)
    torch.manual_seed(3)
    found = model.forward_features(images)
    torch.manual_seed(3)
    x = torch.cat([model.cls_token.expand(6, -1, -1), model.patch_embed(images)], 1) + model.pos_embed
    for i, block in enumerate(model.blocks):
        x = x + stochastic_depth(block.attn(block.norm1(x)), 0.2 * i, "row")
        x = x + stochastic_depth(block.mlp(block.norm2(x)), 0.2 * i, "row")
    expected = model.norm(x)
    assert torch.allclose(found, expected, rtol=0, atol=1e-6)
    model.eval()
    assert not torch.allclose(found, model.forward_features(images), atol=1e-2)


def test_the_rates_rise_linearly_from_zero(tiny_config):
    for layers, rates in ((4, [0, 0.1, 0.2, 0.3]), (2, [0, 0.3]), (1, [0])):
        assert [block.drop_path for block in deep(tiny_config, 0.3, layers).blocks] == pytest.approx(rates)


def test_stochastic_depth_drops_branches_at_their_rates_and_keeps_their_mean(tiny_config):
    """Of the last of two blocks; each image on its own, each branch on its own."""
    model, kept = deep(tiny_config, 0.3, 2), []
    model.blocks[1].register_forward_pre_hook(lambda module, inputs: kept.append(torch.stack(inputs[2]).flatten(1)))
    model.blocks[0].register_forward_pre_hook(lambda module, inputs: kept.append(inputs[2]))
    torch.manual_seed(0)
    for _ in range(10):
        model(torch.zeros(400, 3, 16, 16))
    assert kept[::2] == [None] * 10
    factors = torch.cat(kept[1::2], dim=1)                                        # (2, 4000)
    assert factors.unique().tolist() == pytest.approx([0, 1 / 0.7])
    dropped = (factors == 0).double()
    deviation = math.sqrt(0.3 * 0.7 / 4000)
    assert all(abs(share - 0.3) < 4 * deviation for share in dropped.mean(dim=1).tolist())
    assert abs(torch.corrcoef(dropped)[0, 1].item()) < 4 / math.sqrt(4000)


def test_stochastic_depth_leaves_evaluation_and_a_rate_of_zero_alone(tiny_config):
    images = torch.randn(2, 3, 16, 16)
    with_rate, without = deep(tiny_config, 0.5), deep(tiny_config, 0.0)
    before = torch.get_rng_state()
    expected = without(images)
    assert torch.equal(with_rate.eval()(images), expected)
    assert torch.equal(torch.get_rng_state(), before)  # nothing was drawn
    with_rate.train()(images)
    assert not torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_stochastic_depth_under_checkpointing_gives_the_same_gradients_to_the_bit(tiny_config, dropout):
    model, gradients = deep(tiny_config, 0.6, dropout_rate=dropout), []
    images = torch.randn(5, 3, 16, 16)
    for again in (False, True):
        model.gradient_checkpointing = again
        torch.manual_seed(1)
        loss = F.cross_entropy(model(images), torch.tensor([0, 1, 2, 3, 4]))
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    assert all(torch.equal(one, other) for one, other in zip(*gradients))


def test_stochastic_depth_is_the_same_where_the_last_block_computes_one_row(tiny_config):
    model, images, logits = deep(tiny_config, 0.6).double(), torch.randn(8, 3, 16, 16, dtype=torch.float64), []
    for whole in (False, True):
        torch.manual_seed(2)
        logits.append(model.head(model.forward_features(images)[:, 0]) if whole else model(images))
    assert torch.allclose(*logits, rtol=0, atol=1e-12)


def test_its_draws_are_a_function_of_seed_step_and_micro_batch(tiny_config):
    model, images = deep(tiny_config, 0.6), torch.randn(8, 3, 16, 16)

    def logits(*numbers):
        seed_dropout(model, numbers)
        return model(images)
    first = logits(0, 3, 1)
    assert torch.equal(first, logits(0, 3, 1))
    assert not any(torch.equal(first, logits(*other)) for other in ((1, 3, 1), (0, 4, 1), (0, 3, 0)))


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # PyTorch's compiler looks at it itself
def test_blocks_of_all_rates_are_compiled_once(tiny_config):
    """That is, once without stochastic depth, once with it and once for the last block's single row."""
    torch.compiler.reset()
    model, graphs = deep(tiny_config, 0.3), []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward
    for block in model.blocks:
        block.compile(backend=count)
    for _ in range(2):
        model(torch.randn(3, 3, 16, 16)).sum().backward()
    torch.compiler.reset()
    assert len(graphs) == 3
