import copy

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

from models import exchange, lora
from models.attention import attention_maps
from models.configs import replace
from models.modeling import VisionTransformer
from tests.conftest import randomise
from utils.device import compile_blocks
from utils.optim import make_optimizer
from utils.step import make_scaler, train_step


def images(count=4, dtype=torch.float32, seed=0):
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def adapted(model, rank=3, alpha=None):
    """The model with LoRA that has learned something: B is away from zero."""
    lora.add(model, rank, alpha)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(".B"):
                p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * 0.1)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("classifier", ["token", "gap"])
def test_at_the_start_the_model_computes_what_it_did_to_the_bit(tiny_config, classifier, dtype):
    model = randomise(VisionTransformer(replace(tiny_config, classifier=classifier), 16, 5).to(dtype))
    x = images(dtype=dtype)
    with torch.no_grad():
        logits, tokens = model(x), model.forward_features(x)
        lora.add(model, 3)
        assert torch.equal(model(x), logits) and torch.equal(model.forward_features(x), tokens)


def test_only_a_and_b_train_and_there_are_three_pairs_in_qkv(tiny_model):
    lora.add(tiny_model, 4)
    training = {name: tuple(p.shape) for name, p in tiny_model.named_parameters() if p.requires_grad}
    assert training == {f"blocks.{i}.attn.{layer}.{factor}": shape for i in (0, 1)
                        for layer, parts in (("qkv", 3), ("proj", 1))
                        for factor, shape in (("A", (parts, 4, 32)), ("B", (parts, 32, 4)))}
    parameters = lora.parameters(tiny_model)
    assert {id(p) for p in parameters} == {id(p) for p in tiny_model.parameters() if p.requires_grad}
    assert sum(p.numel() for p in parameters) == 2 * 4 * (2 * 4 * 32)  # layers, kernels, R (in + out)


def test_the_effective_weight_is_the_formula_of_each_kernel(tiny_model):
    before = {name: value.clone() for name, value in tiny_model.state_dict().items()}
    adapted(tiny_model, rank=3, alpha=12)
    for i, block in enumerate(tiny_model.blocks):
        for name, layer, parts in (("qkv", block.attn.qkv, 3), ("proj", block.attn.proj, 1)):
            kernels = before[f"blocks.{i}.attn.{name}.weight"].chunk(parts)
            sums = [W + 12 / 3 * B @ A for W, A, B in zip(kernels, layer.A, layer.B)]
            assert torch.allclose(layer.weight, torch.cat(sums), rtol=0, atol=1e-6)


def test_a_is_uniform_within_one_over_the_root_of_its_width_and_follows_from_the_seed(tiny_config):
    drawn = []
    for seed in (0, 0, 1):
        torch.rand(3)  # whatever else draws
        model = VisionTransformer(tiny_config, 16, 5)
        lora.add(model, 8, seed=seed)
        drawn.append(torch.cat([p.flatten() for name, p in model.named_parameters() if name.endswith(".A")]))
        assert not any(p.any() for name, p in model.named_parameters() if name.endswith(".B"))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    bound = 32**-0.5
    assert 0.99 * bound < drawn[0].abs().max() <= bound and drawn[0].std().item() == pytest.approx(bound / 3**0.5, 0.05)


@pytest.mark.parametrize("dtype, precision", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("classifier", ["token", "gap"])
def test_merged_equals_unmerged_and_loads_as_a_plain_model(tiny_config, classifier, dtype, precision):
    config = replace(tiny_config, classifier=classifier)
    model, x = adapted(randomise(VisionTransformer(config, 16, 5).to(dtype))), images(dtype=dtype)
    plain, kept = VisionTransformer(config, 16, 5).to(dtype).eval(), copy.deepcopy(model)
    with torch.no_grad():
        logits = model(x)
        plain.load_state_dict(lora.merged(model), strict=True)
        assert (plain(x) - logits).abs().max() <= precision * logits.abs().max()
        assert torch.equal(model(x), logits) and torch.equal(kept(x), logits)  # neither has changed it
        lora.merge(model)
        assert torch.equal(model(x), plain(x))
    assert model.state_dict().keys() == plain.state_dict().keys() and type(model.blocks[0].attn.qkv) is type(
        plain.blocks[0].attn.qkv)
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in model.state_dict().items())
    assert lora.parameters(model) == []


def test_merged_takes_other_weights_of_the_same_names(tiny_model):
    adapted(tiny_model)
    then = {name: value.clone() for name, value in tiny_model.state_dict().items()}
    expected = lora.merged(tiny_model)
    with torch.no_grad():
        for p in lora.parameters(tiny_model):
            p.mul_(2)
    found = lora.merged(tiny_model, then)
    assert all(torch.equal(value, expected[name]) for name, value in found.items())
    assert not torch.equal(found["blocks.0.attn.qkv.weight"], tiny_model.blocks[0].attn.qkv.weight)


def test_without_lora_merged_is_the_state_itself(tiny_model):
    own = tiny_model.state_dict()
    found = lora.merged(tiny_model)
    assert list(found) == list(own) and all(torch.equal(found[name], own[name]) for name in own)
    lora.merge(tiny_model)
    assert list(tiny_model.state_dict()) == list(own)


def test_the_saved_file_has_timms_names_and_the_logits_of_the_run(tiny_model, tmp_path):
    adapted(tiny_model)
    exchange.save(tiny_model, tmp_path / "last.safetensors", {}, weights=lora.merged(tiny_model))
    loaded = exchange.load(tmp_path / "last.safetensors").eval()
    with torch.no_grad():
        assert torch.equal(loaded(images()), tiny_model(images()))


def test_autocast_rounds_the_sum_and_not_the_product(tiny_model):
    adapted(tiny_model)
    plain = VisionTransformer(tiny_model.config, 16, 5).eval()
    plain.load_state_dict(lora.merged(tiny_model))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert tiny_model.blocks[0].attn.qkv.weight.dtype == torch.float32
        assert torch.equal(tiny_model(images()), plain(images()))


def test_the_gradients_of_a_and_b_are_those_of_the_formula(tiny_model):
    """y = (W + s B A) x, of each kernel: dA = s B' (dy' x), dB = s (dy' x) A'."""
    layer = adapted(tiny_model.double(), rank=3, alpha=6).blocks[0].attn.qkv
    x, upstream = (torch.randn(2, 7, width, dtype=torch.float64) for width in (32, 96))
    layer(x).backward(upstream)
    for p, outer in enumerate((upstream.flatten(0, 1).T @ x.flatten(0, 1)).chunk(3)):
        assert torch.allclose(layer.A.grad[p], 2 * layer.B[p].T @ outer, rtol=1e-12, atol=1e-12)
        assert torch.allclose(layer.B.grad[p], 2 * outer @ layer.A[p].T, rtol=1e-12, atol=1e-12)
    assert layer.kernel.weight.grad is None and layer.bias.grad is None


def test_the_whole_models_gradients_equal_those_of_an_explicit_sum(tiny_model):
    """Through the last block's one row, too: a plain model whose weights are given as W + s B A by hand."""
    model, x, y = adapted(tiny_model.double()), images(dtype=torch.float64), torch.tensor([0, 3, 1, 1])
    F.cross_entropy(model(x), y).backward()
    leaves = {name: value.clone().requires_grad_(name.endswith((".A", ".B")))
              for name, value in model.state_dict().items()}
    plain = VisionTransformer(model.config, 16, 5).double().eval()
    logits = torch.func.functional_call(plain, lora.merged(model, leaves), (x,))
    F.cross_entropy(logits, y).backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert p.grad.abs().max() > 1e-9
            assert torch.allclose(p.grad, leaves[name].grad, rtol=1e-10, atol=1e-14), name


def test_the_attention_maps_are_those_of_the_merged_model(tiny_model):
    before = attention_maps(tiny_model, images())
    found = attention_maps(adapted(tiny_model), images())
    lora.merge(tiny_model)
    assert all(torch.equal(a, b) for a, b in zip(found, attention_maps(tiny_model, images())))
    assert not torch.allclose(found[0], before[0], atol=1e-4)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # dynamo looks at it itself
def test_compiled_blocks_train_alike(tiny_config):
    """Whole (fullgraph), in three programs: of the first block, whose input needs no gradient, the last and the others.
    """
    losses, y = {}, torch.tensor([0, 3, 1, 1])
    for compiled in (False, True):
        model = adapted(randomise(VisionTransformer(replace(tiny_config, num_layers=5), 16, 5))).train()
        if compiled:
            torch._dynamo.reset()
            counter = CompileCounterWithBackend("aot_eager")
            compile_blocks(model, backend=counter, fullgraph=True)
        optimizer, scaler = make_optimizer(model, "sgd"), make_scaler("cpu", torch.float32)
        losses[compiled] = [train_step(model, optimizer, scaler, images(), y, lr=0.1).loss.item() for _ in range(4)]
    assert losses[True] == pytest.approx(losses[False], rel=1e-5) and counter.frame_count == 3


def test_it_learns_a_small_problem_and_changes_nothing_else(tiny_config):
    """The head is random and frozen: only A and B can fit eight images."""
    torch.manual_seed(0)
    model = VisionTransformer(tiny_config, 16, 5).train()
    torch.nn.init.normal_(model.head.weight)
    lora.add(model, 4)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    optimizer, scaler = make_optimizer(model, "adam"), make_scaler("cpu", torch.float32)
    x, y = images(8), torch.arange(8) % 5
    losses = [train_step(model, optimizer, scaler, x, y, lr=0.01).loss.item() for _ in range(40)]
    assert losses[-1] < 0.3 * losses[0]
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)


def test_a_state_dict_goes_into_another_model_with_lora(tiny_config, tiny_model):
    """As when a run is continued: the names are the same, the values those of the state."""
    model, other = adapted(tiny_model), VisionTransformer(tiny_config, 16, 5).eval()
    lora.add(other, 3, seed=5)
    other.load_state_dict(model.state_dict(), strict=True)
    with torch.no_grad():
        assert torch.equal(other(images()), model(images()))
