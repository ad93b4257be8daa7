import pytest
import torch

from models.modeling import VisionTransformer
from utils.optim import clip_by_global_norm, lr_at, make_optimizer


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
