import io

import pytest
import torch

from models import lora
from models.configs import CONFIGS, replace
from models.modeling import VisionTransformer
from tests.conftest import randomise
from utils.optim import make_optimizer
from utils.state import State
from utils.step import make_scaler, train_step
from utils.trainable import choose, in_words, parse

EVERY = ["head", "last:1", "last:3", "norm", "lora:2", "all"]


@pytest.fixture
def config(tiny_config):
    return replace(tiny_config, num_layers=3)


def build(config, what):
    model = randomise(VisionTransformer(config, 16, 5)).train()
    choose(model, what)
    return model


def training(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def bits(tensor):
    return tensor.detach().clone().view(torch.int32)


def batch(count=8):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, 16, 16, generator=generator), torch.randint(0, 5, (count,), generator=generator)


def saved_bytes(model):
    """Bytes that a forward pass keeps for the backward pass, parameters apart; and its output."""
    own, kept = {p.untyped_storage()._cdata for p in model.parameters()}, {}

    def keep(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = model(batch()[0])
    return sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in own), logits


# --- What is asked for -----------------------------------------------------------------------------------------------

def test_words_and_numbers(config):
    assert [parse(what, config) for what in ("all", "head", "norm", "last:2", "lora:32")] == [
        ("all", 0), ("head", 0), ("norm", 0), ("last", 2), ("lora", 32)]


@pytest.mark.parametrize("what", ["", "heads", "last", "last:", "last:0", "last:-1", "last:1.5", "lora", "lora:x",
                                  "lora:08", "head:1", "all:", "norm:2", "last:1:2", " head", "LAST:1",
                                  "last:" + "9" * 5000])
def test_other_words_are_refused_with_all_that_there_are(config, what):
    with pytest.raises(ValueError, match=r"choose head, last:N .*, norm, lora:R .* or all\.$"):
        parse(what, config)


def test_more_blocks_and_a_higher_rank_than_there_are_are_refused_with_both_numbers(config):
    with pytest.raises(ValueError, match="is last:4, and custom has 3 blocks: give last:3 at most."):
        parse("last:4", config)
    with pytest.raises(ValueError, match="is lora:33, and custom has kernels of rank 32: give lora:32 at most."):
        parse("lora:33", config)


# --- What trains -----------------------------------------------------------------------------------------------------

def test_each_choice_trains_these_and_no_others(config):
    names = {name for name, _ in VisionTransformer(config, 16, 5).named_parameters()}
    head = {"head.weight", "head.bias"}

    def of(*starts):
        return {name for name in names if name.startswith(starts)}
    assert training(build(config, "all")) == names
    assert training(build(config, "head")) == head
    assert training(build(config, "last:1")) == of("blocks.2.", "norm.") | head
    assert training(build(config, "last:3")) == of("blocks.", "norm.") | head
    assert training(build(config, "norm")) == {name for name in names if "norm" in name} | head
    model = build(config, "lora:2")
    added = {name for name in training(model) if name.endswith((".A", ".B"))}
    assert training(model) == added | head and len(added) == len(lora.parameters(model)) == 3 * 2 * 2


def test_a_hybrids_group_norms_are_norms():
    model = VisionTransformer(CONFIGS["R+ViT-Ti_16"], 32, 5)
    choose(model, "norm")
    assert {"patch_embed.backbone.norm.weight", "norm.bias", "head.weight"} <= training(model)
    assert all("norm" in name or name.startswith("head.") for name in training(model))


def test_what_stands_before_the_head_trains_with_it(config):
    assert training(build(replace(config, representation_size=8), "head")) == {
        "pre_logits.fc.weight", "pre_logits.fc.bias", "head.weight", "head.bias"}


def test_the_line_counts_what_trains(config):
    D, M = 32, 64
    patches, places = 3 * 4 * 4 * D + D, 16 * D + D + D
    block = 4 * (D * D + D) + 2 * D * M + D + M + 4 * D
    head, norms = 5 * D + 5, 2 * D * (2 * 3 + 1)
    total = patches + places + 3 * block + 2 * D + head
    for what, count, extra in (("head", head, 0), ("last:2", 2 * block + 2 * D + head, 0), ("norm", norms + head, 0),
                               ("lora:2", head + 3 * 2 * 8 * D, 3 * 2 * 8 * D), ("all", total, 0)):
        share = 100 * count / (total + extra)
        assert in_words(build(config, what), what) == (
            f"{what}: {count:,} of {total + extra:,} parameters ({share:.3g} %)")


def test_loras_first_values_follow_from_the_seed(config):
    first, same, other = (VisionTransformer(config, 16, 5) for _ in range(3))
    for model, seed in ((first, 7), (same, 7), (other, 8)):
        choose(model, "lora:2", seed=seed)
    assert all(torch.equal(p, q) for p, q in zip(lora.parameters(first), lora.parameters(same)))
    assert not torch.equal(first.blocks[0].attn.qkv.A, other.blocks[0].attn.qkv.A)


@pytest.mark.parametrize("kind", ["sincos1d", "sincos2d", "none"])
@pytest.mark.parametrize("what", EVERY)
def test_a_position_embedding_by_formula_never_trains(config, what, kind):
    learned, fixed = build(config, what), build(replace(config, pos_embed=kind), what)
    assert training(fixed) == training(learned) - {"pos_embed"}
    count = sum(p.numel() for p in learned.parameters() if p.requires_grad) - 17 * 32 * (what == "all")
    assert in_words(fixed, what).startswith(f"{what}: {count:,} of ")


# --- Updates ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("optimizer, options", [
    ("sgd", {}), ("sgd", {"momentum_dtype": torch.bfloat16}), ("adam", {}), ("adamw", {})])
@pytest.mark.parametrize("what", EVERY)
def test_frozen_parts_keep_their_bits_and_all_others_move(config, what, optimizer, options):
    """With weight decay, momentum, clipping and accumulation; the optimiser holds what trains and nothing else."""
    model = build(config, what)
    trains, before = training(model), {name: bits(p) for name, p in model.named_parameters()}
    optimizer = make_optimizer(model, optimizer, weight_decay=0.1, **options)
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    for step in range(3):
        result = train_step(model, optimizer, make_scaler("cpu", torch.float32), *batch(), lr=0.01, micro_batches=2,
                            max_grad_norm=0.5, dropout_seed=(0, step))
        assert result.finite and result.grad_norm > 0
    moved = {name for name, p in model.named_parameters() if not torch.equal(bits(p), before[name])}
    assert moved == trains


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("what", ["head", "lora:2"])
def test_in_half_precision_too(config, what, precision):
    model = build(config, what)
    trains, before = training(model), {name: bits(p) for name, p in model.named_parameters()}
    optimizer, scaler = make_optimizer(model, "adamw", weight_decay=0.1), make_scaler("cpu", precision, 2.0**4)
    for _ in range(3):
        assert train_step(model, optimizer, scaler, *batch(), lr=0.01, precision=precision).finite
    assert {name for name, p in model.named_parameters() if not torch.equal(bits(p), before[name])} == trains


@pytest.mark.parametrize("what", ["head", "last:1", "lora:2"])
def test_a_run_that_is_continued_is_the_one_that_never_stopped(config, what):
    def begin(seed):
        model = randomise(VisionTransformer(config, 16, 5), seed).train()
        choose(model, what, seed=seed)
        return State(model, make_optimizer(model, "adamw", weight_decay=0.1), make_scaler("cpu", torch.float32))

    def go_on(now, steps):
        for _ in range(steps):
            train_step(now.model, now.optimizer, now.scaler, *batch(), lr=0.01)
    whole, first, second = begin(0), begin(0), begin(1)
    go_on(whole, 4)
    go_on(first, 2)
    file = io.BytesIO()
    torch.save(first.content(), file)
    file.seek(0)
    second.restore(torch.load(file, weights_only=True))
    go_on(second, 2)
    assert all(torch.equal(p, q) for p, q in zip(whole.model.parameters(), second.model.parameters()))


def test_the_gradient_of_what_trains_is_that_of_full_training(config):
    whole, part = build(config, "all"), build(config, "last:1")
    for model in (whole, part):
        torch.nn.functional.cross_entropy(model(batch()[0]), batch()[1]).backward()
    theirs = dict(whole.named_parameters())
    for name, p in part.named_parameters():
        assert (p.grad is None) is (name not in training(part))
        assert p.grad is None or torch.equal(p.grad, theirs[name].grad)


@pytest.mark.parametrize("what, first", [("head", 3), ("last:1", 2), ("last:2", 1), ("last:3", 0), ("norm", 0),
                                         ("lora:2", 0)])
def test_frozen_blocks_leave_no_graph(config, what, first):
    """`first`: the first block whose output a gradient goes through."""
    model, needed = build(config, what), []
    for block in model.blocks:
        block.register_forward_hook(lambda module, inputs, output: needed.append(output.requires_grad))
    model.patch_embed.register_forward_hook(lambda module, inputs, output: needed.append(output.requires_grad))
    model(batch()[0])
    assert needed == [False] + [layer >= first for layer in range(3)]


def test_less_training_keeps_less_for_the_way_back(config):
    sizes = [saved_bytes(build(config, what))[0] for what in ("head", "last:1", "last:2", "last:3", "all")]
    assert sizes == sorted(sizes) and len(set(sizes)) == 5
    assert sizes[0] <= 4 * 8 * (32 + 2 * 5)  # the head's input and what the loss would read
    assert sizes[1] < 0.4 * sizes[3]


def test_checkpointed_frozen_blocks_are_not_computed_anew(config):
    model, passes = build(config, "last:1"), [0, 0, 0]
    model.gradient_checkpointing = True
    for i, block in enumerate(model.blocks):
        block.mlp.register_forward_pre_hook(lambda *_, i=i: passes.__setitem__(i, passes[i] + 1))
    model(batch()[0]).sum().backward()
    assert passes == [1, 1, 2]
