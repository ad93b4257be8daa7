"""Averaged weights against their formulas written out, and what the average must leave alone."""

import numpy as np
import pytest
import torch

from models import exchange, lora
from models.modeling import VisionTransformer
from tests.conftest import randomise
from utils.averaging import Average, decay_at
from utils.device import compile_blocks
from utils.optim import make_optimizer
from utils.step import make_scaler, train_step
from utils.trainable import choose

KINDS = [{"ema": 0.9}, {"swa_from": 3}]


def fresh(config, what="all", dtype=torch.float32, seed=0):
    model = randomise(VisionTransformer(config, 16, 5).to(dtype), seed).train()
    choose(model, what, seed=seed)
    stir(lora.parameters(model), seed)
    return model


@torch.no_grad()
def stir(parameters, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in parameters:
        p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype), alpha=0.1)


def run(model, steps, average):
    """As if updated, to weights that follow from those before and the step; the plain weights after each, copied."""
    after = []
    for step in steps:
        stir([p for p in model.parameters() if p.requires_grad], step)
        average.update(model, step)
        after.append(copied(lora.merged(model)))
    return after


def train(model, optimizer, images):
    labels = torch.arange(len(images)) % 5
    return train_step(model, optimizer, make_scaler("cpu", torch.float32), images, labels, lr=0.1)


def copied(weights):
    return {name: value.detach().clone() for name, value in weights.items()}


def written_out(snapshots, ema=0.0, swa_from=None):
    """The average of [{name: weights}] in float64."""
    taken = [{name: value.double().numpy() for name, value in one.items()} for one in snapshots]
    if swa_from is not None:
        return {name: np.mean([one[name] for one in taken[swa_from:]], axis=0) for name in taken[0]}
    average = taken[0]
    for t, one in enumerate(taken[1:], start=1):
        d = min(ema, (1 + t) / (10 + t))
        average = {name: d * average[name] + (1 - d) * one[name] for name in one}
    return average


def furthest(found, expected):
    assert found.keys() == expected.keys()
    return max(np.abs(np.asarray(found[name], dtype=np.float64) - np.asarray(expected[name])).max() for name in found)


@pytest.mark.parametrize("dtype, precision", [(torch.float32, 1e-6), (torch.float64, 1e-14)])
@pytest.mark.parametrize("kind", [*KINDS, {"ema": 0.3}])
@pytest.mark.parametrize("what", ["all", "lora:2"])
def test_it_is_the_formula(what, kind, dtype, precision, tiny_config):
    """0.3 is reached by (1 + t) / (10 + t) at t = 3, 0.9 not before t = 80."""
    model = fresh(tiny_config, what, dtype)
    average = Average(model, **kind)
    after = run(model, range(1, 13), average)
    state = average.model.state_dict()
    assert furthest(state, written_out(after, **kind)) < precision
    assert furthest(state, after[-1]) > 0.1
    assert {value.dtype for value in state.values()} == {dtype}
    assert average.count == 12 - kind.get("swa_from", 0)


def test_the_decay_rule():
    assert decay_at(0, 0.9999) == 0.1 and decay_at(1, 0.9999) == 2 / 11 and decay_at(1000, 0.9999) == 1001 / 1010
    assert decay_at(1000, 0.9) == 0.9 and decay_at(10**6, 0.9999) == 0.9999


def test_the_first_weights_are_copied_and_those_before_swa_from_are_not_taken(tiny_config):
    model = fresh(tiny_config)
    ema, swa = Average(model, ema=0.99), Average(model, swa_from=3)
    start = copied(model.state_dict())
    for step in (1, 2, 3, 4):
        run(model, [step], ema)
        swa.update(model, step)
        assert ema.ready and swa.ready == (step > 3) and (ema.count, swa.count) == (step, max(step - 3, 0))
        expected = {1: (model.state_dict(), start), 3: (None, start), 4: (None, model.state_dict())}.get(step, ())
        for one, state in zip((ema, swa), expected):
            assert state is None or all(torch.equal(p, state[name]) for name, p in one.model.state_dict().items())
    assert swa.state_dict()["weights"].keys() == start.keys()


def test_of_lora_the_products_are_averaged_and_not_the_factors(tiny_config):
    model = fresh(tiny_config, "lora:2")
    average, factors = Average(model, swa_from=0), []
    for step in range(1, 6):
        run(model, [step], average)
        factors.append(copied(model.state_dict()))
    products = written_out([lora.merged(model, one) for one in factors], swa_from=0)
    means = {name: torch.stack([one[name] for one in factors]).mean(dim=0) for name in factors[0]}
    of_means, found = lora.merged(model, means), average.model.state_dict()
    assert list(found) == list(VisionTransformer(tiny_config, 16, 5).state_dict())  # a plain model's
    assert furthest(found, products) < 1e-6
    name = "blocks.0.attn.qkv.weight"
    assert np.abs(of_means[name].numpy() - products[name]).max() > 1e-2


@pytest.mark.parametrize("what, averaged", [
    ("head", {"head.weight", "head.bias"}),
    ("lora:2", {"head.weight", "head.bias", *(f"blocks.{i}.attn.{layer}.weight" for i in (0, 1)
                                               for layer in ("qkv", "proj"))})])
def test_frozen_weights_are_the_models_own(what, averaged, tiny_config):
    model = fresh(tiny_config, what)
    average = Average(model, ema=0.9)
    before = copied(lora.merged(model))
    run(model, range(1, 5), average)
    state, own = average.model.state_dict(), lora.merged(model)
    addresses = {value.data_ptr() for value in own.values()}
    for name, value in state.items():
        assert torch.equal(value, before[name]) == (name not in averaged), name
        assert torch.equal(value, own[name]) == (value.data_ptr() in addresses) == (name not in averaged), name
    assert average.state_dict()["weights"].keys() == averaged
    other = fresh(tiny_config, what, seed=9)  # as in a run that goes on: filled after the average was made
    restored = Average(other, ema=0.9)
    other.load_state_dict(model.state_dict())
    restored.load_state_dict(average.state_dict())
    assert all(torch.equal(value, state[name]) for name, value in restored.model.state_dict().items())


@pytest.mark.parametrize("what", ["all", "last:1", "lora:2"])
def test_its_model_is_plain_and_computes_what_a_loaded_one_does(what, tiny_config, tmp_path):
    model = fresh(tiny_config, what)
    average = Average(model, ema=0.9)
    run(model, range(1, 4), average)
    plain, x = VisionTransformer(tiny_config, 16, 5).eval(), torch.randn(4, 3, 16, 16)
    plain.load_state_dict(average.model.state_dict(), strict=True)
    exchange.save(average.model, tmp_path / "averaged.safetensors", {})
    loaded = exchange.load(tmp_path / "averaged.safetensors").eval()
    logits = average.model(x)
    assert torch.equal(logits, plain(x)) and torch.equal(logits, loaded(x)) and not logits.requires_grad
    assert not torch.allclose(logits, model(x), atol=1e-4)
    assert model.training and not any(module.training for module in average.model.modules())
    assert not any(p.requires_grad for p in average.model.parameters())


def test_neither_compiled_blocks_nor_gradient_checkpointing_are_copied(tiny_config):
    model = fresh(tiny_config)
    model.gradient_checkpointing = True
    compile_blocks(model, backend="eager")
    copied = Average(model, ema=0.9).model
    assert not copied.gradient_checkpointing and not any(module._compiled_call_impl for module in copied.modules())
    assert model.gradient_checkpointing and all(block._compiled_call_impl for block in model.blocks)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what", ["all", "lora:2"])
def test_the_model_trains_as_it_would_alone(what, kind, tiny_config):
    images, states = torch.randn(4, 3, 16, 16), []
    for watched in (False, True):
        model = fresh(tiny_config, what)
        optimizer, average = make_optimizer(model, "sgd"), Average(model, **kind)
        for step in range(1, 6):
            train(model, optimizer, images)
            if watched:
                before = copied(model.state_dict())
                average.update(model, step)
                assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        states.append(model.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    trains = [p.requires_grad for p in fresh(tiny_config, what).parameters()]
    assert [p.requires_grad for p in model.parameters()] == trains and model.training and average.ready


@pytest.mark.parametrize("what", ["all", "lora:2"])
def test_autocast_changes_no_bit(what, tiny_config):
    averages = []
    for enabled in (False, True):
        model = fresh(tiny_config, what)
        average = Average(model, ema=0.9)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            run(model, range(1, 4), average)
        averages.append(average.model.state_dict())
    assert all(torch.equal(value, averages[1][name]) for name, value in averages[0].items())
    assert {value.dtype for value in averages[1].values()} == {torch.float32}


@pytest.mark.parametrize("kind", [*KINDS, {"swa_from": 7}])
@pytest.mark.parametrize("what", ["all", "head", "lora:2"])
def test_ten_updates_equal_five_a_file_and_five_more(what, kind, tiny_config, tmp_path):
    model = fresh(tiny_config, what)
    whole = Average(model, **kind)
    run(model, range(1, 11), whole)

    model = fresh(tiny_config, what)
    half = Average(model, **kind)
    run(model, range(1, 6), half)
    torch.save({"model": model.state_dict(), "average": half.state_dict()}, tmp_path / "state.pt")
    content = torch.load(tmp_path / "state.pt", weights_only=True)
    model = fresh(tiny_config, what, seed=5)
    again = Average(model, **kind)
    model.load_state_dict(content["model"])
    again.load_state_dict(content["average"])
    assert again.count == half.count and again.ready == half.ready
    run(model, range(6, 11), again)
    assert again.count == whole.count
    expected = whole.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in again.model.state_dict().items())


def test_a_run_given_more_updates_averages_its_new_end(tiny_config):
    """As where --num_steps has changed: kept as long as the new end reaches back to it, else begun anew."""
    model = fresh(tiny_config)
    ended = Average(model, swa_from=3)
    after = run(model, range(1, 6), ended)
    later, sooner = Average(model, swa_from=6), Average(model, swa_from=4)
    for average in (later, sooner):
        average.load_state_dict(ended.state_dict())
    for step in (6, 7, 8):
        after += run(model, [step], later)
        sooner.update(model, step)
        assert later.ready == (step > 6)
    assert furthest(later.model.state_dict(), written_out(after, swa_from=6)) < 1e-6
    assert furthest(sooner.model.state_dict(), written_out(after, swa_from=3)) < 1e-6


def test_a_masked_update_is_averaged_as_the_weights_before_it(tiny_config):
    model = fresh(tiny_config)
    average, optimizer, after = Average(model, swa_from=0), make_optimizer(model, "sgd"), []
    for step, value in enumerate((0.5, torch.nan, -0.5), start=1):
        made = train(model, optimizer, torch.full((4, 3, 16, 16), value)).finite
        assert made == (step != 2)
        average.update(model, step)
        after.append(copied(model.state_dict()))
    assert average.count == 3 and furthest(after[0], after[1]) == 0 < furthest(after[1], after[2])
    assert furthest(average.model.state_dict(), written_out(after, swa_from=0)) < 1e-6


@pytest.mark.parametrize("damage, words", [
    ("decay", "averaged with"), ("rule", "averaged with"), ("name", "head.bias does not fit"),
    ("shape", "head.bias does not fit"), ("type", "head.bias does not fit"), ("more", "extra does not fit"),
    ("no weights", "does not fit"), ("no count", "no state of averaged weights"), ("none", "no state of averaged"),
    ("numbers", "no state of averaged")])
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(damage, words, tiny_config):
    model = fresh(tiny_config)
    average, other = Average(model, ema=0.9), Average(model, ema=0.9)
    run(model, [1, 2], average)
    state = average.state_dict()
    weights, bias = state["weights"], state["weights"]["head.bias"]
    state |= {"decay": {"ema": 0.8}, "rule": {"ema": 0.0}, "shape": {"weights": weights | {
        "head.bias": bias[:3]}}, "type": {"weights": weights | {"head.bias": bias.double()}}, "more": {
        "weights": weights | {"extra": bias}}, "no weights": {"weights": {}}, "numbers": {"weights": [1, 2]}, "name": {
        "weights": {name: value for name, value in weights.items() if name != "head.bias"}}}.get(damage, {})
    if damage == "no count":
        del state["count"]
    before = copied(other.model.state_dict())
    with pytest.raises(ValueError, match=words) as error:
        other.load_state_dict(None if damage == "none" else state)
    assert "\n" not in str(error.value) and str(error.value).endswith(".")
    assert not other.ready and all(torch.equal(p, before[name]) for name, p in other.model.state_dict().items())


@pytest.mark.parametrize("kind", [{}, {"ema": 0.9, "swa_from": 3}, {"ema": 0.0}, {"ema": 1.0}, {"ema": -0.1},
                                  {"swa_from": -1}, {"ema": 0.9, "swa_from": 0}])
def test_exactly_one_rule_within_its_range(kind, tiny_config):
    with pytest.raises(ValueError, match="either with a decay between 0 and 1 or from a number of updates on"):
        Average(VisionTransformer(tiny_config, 16, 5), **kind)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", [{"ema": 0.9}, {"swa_from": 0}])
@pytest.mark.parametrize("what", ["all", "lora:2"])
def test_nothing_waits_for_the_device(what, kind, tiny_config):
    model = fresh(tiny_config, what).cuda()
    average = Average(model, **kind)
    try:
        torch.cuda.set_sync_debug_mode("error")
        for step in range(1, 4):
            average.update(model, step)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert average.model.head.weight.is_cuda and average.count == 3
