import io

import numpy as np
import pytest
import torch
from torch import nn

from models.modeling import VisionTransformer
from utils.optim import NarrowMomentumSGD, clip_by_global_norm, lr_at, make_optimizer

SIGNS = {torch.bfloat16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}  # where -0.0 is not 0.0


def test_the_first_update_has_rate_zero_and_the_peak_comes_after_the_warm_up():
    rates = [lr_at(step, base=0.03, total=100, warmup=10) for step in range(100)]  # of updates 1 to 100
    assert rates[0] == 0 and rates[5] == pytest.approx(0.015)
    assert rates[10] == pytest.approx(0.03) and max(rates) == rates[10]
    assert rates[55] == pytest.approx(0.015) and 0 < rates[99] < 1e-4


def test_cosine_ends_at_zero_and_linear_at_1e_minus_5():
    assert lr_at(100, base=0.03, total=100, warmup=10) == 0
    assert lr_at(100, base=0.03, total=100, warmup=10, decay="linear") == pytest.approx(1e-5)
    assert lr_at(55, base=0.03, total=100, warmup=10, decay="linear") == pytest.approx((0.03 + 1e-5) / 2)


def test_without_warm_up_the_first_update_has_the_full_rate():
    assert lr_at(0, base=0.5, total=10, warmup=0) == 0.5


def test_a_warm_up_longer_than_the_run_only_warms_up():
    assert [lr_at(s, base=1.0, total=2, warmup=500) for s in (0, 1)] == [0, pytest.approx(0.002)]


def test_unknown_decay_is_refused():
    with pytest.raises(ValueError, match="no decay 'step'"):
        lr_at(0, base=1, total=10, warmup=0, decay="step")


def test_clipping_has_no_epsilon_and_leaves_small_gradients_alone():
    gradients = [torch.tensor([3.0, 0.0], dtype=torch.float64), torch.tensor([4.0], dtype=torch.float64)]  # norm 5
    before = [g.clone() for g in gradients]
    assert clip_by_global_norm(gradients, 5.5).item() == 5
    assert all(torch.equal(g, b) for g, b in zip(gradients, before))
    assert clip_by_global_norm(gradients, 1.25).item() == 5
    assert all(torch.equal(g, b / 4) for g, b in zip(gradients, before))  # an epsilon would show here
    clip_by_global_norm(gradients, 0)
    assert all(torch.equal(g, b / 4) for g, b in zip(gradients, before))


def test_sgd_is_googles_momentum(tiny_config):
    """v = g + 0.9 m; weights -= lr * v: the learning rate acts outside of the momentum."""
    model = VisionTransformer(tiny_config, 16, 5).double()
    optimizer = make_optimizer(model, "sgd")
    weights, momentum = {k: p.detach().clone() for k, p in model.named_parameters()}, {}
    for step, lr in enumerate((0.1, 0.2, 0.05)):
        for group in optimizer.param_groups:
            group["lr"] = lr
        for name, p in model.named_parameters():
            p.grad = torch.full_like(p, step + 1.0)
            momentum[name] = p.grad + 0.9 * momentum.get(name, 0)
            weights[name] -= lr * momentum[name]
        optimizer.step()
    assert all(torch.allclose(p, weights[k], rtol=0, atol=1e-14) for k, p in model.named_parameters())


def layers(dtype):
    """Ten parameters with random weights, the same each time."""
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(7, 7) for _ in range(5))).to(dtype)


def bits(tensor):
    return tensor.detach().view(SIGNS[tensor.dtype]).clone()


def momentum_of(optimizer, p):
    return optimizer.state[p]["momentum_buffer"]


def rounded(array, dtype):
    """Rounds to nearest, ties to even, in numpy; bfloat16 is the upper half of a float32."""
    if dtype != torch.bfloat16:
        return array.astype(np.float32)
    whole = array.astype(np.float32).view(np.uint32)
    return ((whole + 0x7FFF + ((whole >> 16) & 1)) & 0xFFFF0000).view(np.float32)


def update(optimizer, lr, gradients, *, finite=True):
    """One update as `train_step` makes it."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    for p, g in zip(optimizer.param_groups[0]["params"], gradients):
        p.grad = g.clone()
    optimizer.found_inf = torch.tensor(not finite).float()
    optimizer.step()


@pytest.mark.parametrize("compute, narrow, weight_decay", [
    (torch.float32, torch.bfloat16, 0.0), (torch.float64, torch.bfloat16, 0.0), (torch.float64, torch.float32, 0.0),
    (torch.float64, torch.bfloat16, 0.1)])
def test_narrow_momentum_follows_the_rule_of_googles_runs(compute, narrow, weight_decay):
    """v = g + d m, weights -= lr v, m = v rounded; d is rounded, and under float64 d m is, too. By hand in numpy."""
    model = layers(compute)
    optimizer = make_optimizer(model, "sgd", weight_decay=weight_decay, momentum_dtype=narrow)
    factor = {torch.bfloat16: 0.8984375, torch.float32: float(np.float32(0.9))}[narrow]
    parameters, rng = list(model.parameters()), np.random.default_rng(1)
    weights = [p.detach().numpy().copy() for p in parameters]
    momentum = [np.zeros_like(w) for w in weights]
    for lr in (0.0, 0.5, 0.25, 0.125, 0.25, 0.5):
        gradients = [rng.normal(size=w.shape).astype(w.dtype) for w in weights]
        update(optimizer, lr, map(torch.from_numpy, gradients))
        for k, (w, g) in enumerate(zip(weights, gradients)):
            product = w.dtype.type(factor) * momentum[k]
            if compute == torch.float64:
                product = rounded(product, narrow).astype(np.float64)
            v = (g + w.dtype.type(weight_decay) * w) + product
            weights[k], momentum[k] = w - w.dtype.type(lr) * v, rounded(v, narrow).astype(w.dtype)
    for p, w, m in zip(parameters, weights, momentum):
        assert momentum_of(optimizer, p).dtype == narrow
        assert np.array_equal(momentum_of(optimizer, p).to(compute).numpy(), m)
        assert np.abs(p.detach().numpy() - w).max() < (1e-6 if compute == torch.float32 else 1e-15)


@pytest.mark.parametrize("compute, narrow", [
    (torch.float32, torch.bfloat16), (torch.float64, torch.bfloat16), (torch.float64, torch.float32)])
def test_an_update_that_is_not_finite_leaves_weights_and_narrow_momentum_bit_equal(compute, narrow):
    model = layers(compute)
    parameters = list(model.parameters())
    optimizer = make_optimizer(model, "sgd", weight_decay=0.1, momentum_dtype=narrow)
    sound = [torch.randn_like(p) for p in parameters]
    broken = [torch.full_like(p, bad) for p, bad in zip(parameters, 5 * (float("nan"), float("inf")))]
    update(optimizer, 0.1, broken, finite=False)  # the very first update, too
    assert all((bits(momentum_of(optimizer, p)) == 0).all() for p in parameters)
    update(optimizer, 0.1, sound)
    for p in parameters:
        with torch.no_grad():
            p[..., 0] = momentum_of(optimizer, p)[..., 0] = -0.0
    before = [(bits(p), bits(momentum_of(optimizer, p))) for p in parameters]
    update(optimizer, 0.1, broken, finite=False)
    for p, (weight, momentum) in zip(parameters, before):
        assert torch.equal(bits(p), weight) and torch.equal(bits(momentum_of(optimizer, p)), momentum)
    update(optimizer, 0.1, sound)
    assert not any(torch.equal(bits(p), weight) for p, (weight, _) in zip(parameters, before))


@pytest.mark.parametrize("compute", [torch.float32, torch.float64])
def test_many_parameters_at_once_are_updated_as_one_by_one(compute):
    """The former is for a GPU; also when the update is masked."""
    first, second = layers(compute), layers(compute)
    alone, together = (make_optimizer(m, "sgd", momentum_dtype=torch.bfloat16) for m in (first, second))
    together.step = torch.no_grad()(lambda: together._update(list(second.parameters()), together.param_groups[0]))
    for finite in (True, False, True):
        gradients = [torch.randn_like(p) for p in first.parameters()]
        update(alone, 0.1, gradients, finite=finite)
        update(together, 0.1, gradients, finite=finite)
        for p, q in zip(first.parameters(), second.parameters()):
            assert torch.equal(bits(p), bits(q))
            assert torch.equal(bits(momentum_of(alone, p)), bits(momentum_of(together, q)))


def test_narrow_momentum_survives_saving_and_loading():
    """PyTorch casts what it loads to the type of the weights; the run must go on bit for bit."""
    first, second = layers(torch.float32), layers(torch.float32)
    gradients = [[torch.randn_like(p) for p in first.parameters()] for _ in range(3)]
    optimizer, resumed = (make_optimizer(m, "sgd", momentum_dtype=torch.bfloat16) for m in (first, second))
    update(optimizer, 0.1, gradients[0])
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    second.load_state_dict(first.state_dict())
    for p, q in zip(first.parameters(), second.parameters()):
        assert momentum_of(resumed, q).dtype == torch.bfloat16
        assert torch.equal(bits(momentum_of(resumed, q)), bits(momentum_of(optimizer, p)))
    for g in gradients[1:]:
        update(optimizer, 0.1, g)
        update(resumed, 0.1, g)
    assert all(torch.equal(bits(p), bits(q)) for p, q in zip(first.parameters(), second.parameters()))
    assert all(momentum_of(resumed, q).dtype == torch.bfloat16 for q in second.parameters())


def test_a_parameter_without_gradient_is_left_out():
    model = layers(torch.float32)
    optimizer, before = make_optimizer(model, "sgd", momentum_dtype=torch.bfloat16), bits(model[0].weight)
    update(optimizer, 0.1, [torch.ones_like(p) for p in model.parameters()])
    after = bits(model[0].weight)
    assert not torch.equal(after, before)
    model[0].weight.grad = None
    optimizer.step()
    assert torch.equal(bits(model[0].weight), after) and (momentum_of(optimizer, model[0].weight) == 1).all()
    assert (momentum_of(optimizer, model[0].bias) == 1.8984375).all()


def test_momentum_of_the_weights_own_type_is_pytorchs_fused_sgd():
    for dtype, asked in ((torch.float32, None), (torch.float32, torch.float32), (torch.float64, torch.float64)):
        optimizer = make_optimizer(layers(dtype), "sgd", momentum_dtype=asked)
        assert type(optimizer) is torch.optim.SGD and optimizer.defaults["fused"]
        assert [g["momentum"] for g in optimizer.param_groups] == [0.9]
    assert type(make_optimizer(layers(torch.float64), "sgd", momentum_dtype=torch.float32)) is NarrowMomentumSGD


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_a_momentum_type_is_refused_where_there_is_no_momentum(name):
    with pytest.raises(ValueError, match=f"Only sgd's momentum .* {name}"):
        make_optimizer(layers(torch.float32), name, momentum_dtype=torch.bfloat16)


def test_adamw_decays_kernels_only(tiny_model):
    optimizer = make_optimizer(tiny_model, "adamw", weight_decay=0.1)
    names = {id(p): name for name, p in tiny_model.named_parameters()}
    decayed = {names[id(p)] for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    assert decayed == {name for name, p in tiny_model.named_parameters()
                       if name.endswith(("proj.weight", "qkv.weight", "fc1.weight", "fc2.weight", "head.weight"))}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(names)


def test_unknown_optimiser_is_refused(tiny_model):
    with pytest.raises(ValueError, match="no optimiser 'lion'"):
        make_optimizer(tiny_model, "lion")


def test_a_constant_rate_stays_where_the_warm_up_ends():
    rates = [lr_at(step, base=0.5, total=10, warmup=4, decay="constant") for step in range(11)]
    assert rates == [0, 0.125, 0.25, 0.375] + 7 * [0.5]
    with pytest.raises(ValueError, match="choose cosine, linear or constant"):
        lr_at(1, base=1.0, total=2, warmup=0, decay="step")
