import math

import pytest
import torch

from models.configs import replace
from models.modeling import VisionTransformer
from tests.conftest import randomise
from utils.data import Split
from utils.losses import make_criterion
from utils.optim import make_optimizer
from utils.step import make_scaler, train_step


def batch(count=8, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(count, 3, 16, 16, generator=generator, dtype=dtype),
            torch.randint(0, 5, (count,), generator=generator))


def run(config, steps, *, dtype=torch.float32, optimizer="sgd", precision=None, images=None, **options):
    """A few updates of the same random model; returns it, its optimiser and the results."""
    model = randomise(VisionTransformer(config, 16, 5).to(dtype)).train()
    optimizer = make_optimizer(model, optimizer)
    scaler = make_scaler("cpu", precision or dtype, loss_scale=2.0**10)  # fixed: idle in other precisions
    x, y = batch(dtype=dtype)
    results = [train_step(model, optimizer, scaler, x if images is None else images[step], y, lr=0.1,
                          precision=precision or dtype, dropout_seed=(0, step), **options) for step in range(steps)]
    return model, optimizer, results


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_accumulation_equals_the_whole_batch(tiny_config):
    whole, _, first = run(tiny_config, 3, dtype=torch.float64)
    for parts in (2, 4, 8):
        split, _, second = run(tiny_config, 3, dtype=torch.float64, micro_batches=parts)
        assert torch.allclose(weights(split), weights(whole), rtol=0, atol=1e-13)
        assert [r.loss.item() for r in second] == pytest.approx([r.loss.item() for r in first], abs=1e-6)
        assert [r.accuracy.item() for r in second] == [r.accuracy.item() for r in first]


def test_of_mixed_images_the_larger_share_counts_as_the_class(tiny_config):
    x, y = batch()
    mixed = 0.7 * torch.eye(5)[y] + 0.3 * torch.eye(5)[y.flip(0)]
    criterion = make_criterion(Split(x, y, tuple("abcde")))
    model = randomise(VisionTransformer(tiny_config, 16, 5)).train()
    expected = (model(x).argmax(dim=1) == y).float().mean().item()
    for labels in (mixed, y):
        copy = randomise(VisionTransformer(tiny_config, 16, 5)).train()
        result = train_step(copy, make_optimizer(copy, "sgd"), make_scaler("cpu", torch.float32), x, labels, lr=0.1,
                            criterion=criterion, micro_batches=2)
        assert result.accuracy.item() == expected and result.share > 0


def test_an_indivisible_split_is_refused_with_both_numbers(tiny_config):
    with pytest.raises(ValueError, match="8 images cannot be cut into 3 equal"):
        run(tiny_config, 1, micro_batches=3)


def test_the_gradient_is_clipped_once_after_accumulation(tiny_config):
    """With a tiny clip norm the first update moves the weights by exactly lr * clip."""
    start = weights(randomise(VisionTransformer(tiny_config, 16, 5).double()))
    for parts in (1, 4):
        model, _, (result,) = run(tiny_config, 1, dtype=torch.float64, micro_batches=parts, max_grad_norm=1e-3)
        assert result.grad_norm > 1e-3
        assert (weights(model) - start).norm().item() == pytest.approx(0.1 * 1e-3, rel=1e-10)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16, torch.float16])
def test_an_update_that_is_not_finite_leaves_everything_untouched(tiny_config, optimizer, precision):
    x, _ = batch()
    bad = x.clone()
    bad[3, 0, 0, 0] = float("nan")
    clean, state, _ = run(tiny_config, 2, optimizer=optimizer, precision=precision, images=[x, x])
    model, masked, results = run(tiny_config, 3, optimizer=optimizer, precision=precision, images=[bad, x, x])
    assert [r.finite.item() for r in results] == [0, 1, 1]
    assert torch.equal(weights(model), weights(clean))
    for theirs, ours in zip(state.state.values(), masked.state.values()):
        assert all(torch.equal(theirs[name], ours[name]) for name in theirs)


def test_float16_overflow_halves_the_scale_and_the_run_goes_on(tiny_config):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)  # the scaled loss overflows float16 at once
    model = randomise(VisionTransformer(tiny_config, 16, 5)).train()
    start, optimizer, (x, y) = weights(model), make_optimizer(model, "sgd"), batch()
    results = []
    while not results or not results[-1].finite:
        assert torch.equal(weights(model), start)
        results.append(train_step(model, optimizer, scaler, x, y, lr=0.1, precision=torch.float16))
        assert len(results) < 50
    assert len(results) > 1 and [math.log2(r.scale.item()) for r in results] == list(range(40, 40 - len(results), -1))
    assert not torch.equal(weights(model), start)


def test_a_norm_that_overflows_masks_the_update_also_under_a_loss_scale(tiny_config):
    """Each gradient is finite, the square of one is not."""
    model = randomise(VisionTransformer(tiny_config, 16, 5)).train()
    model.head.bias.register_hook(lambda g: torch.full_like(g, 1e25))
    start, optimizer = weights(model), make_optimizer(model, "sgd")
    for precision in (torch.float16, torch.float32):
        result = train_step(model, optimizer, make_scaler("cpu", precision, 1.0), *batch(), lr=0.1, precision=precision)
        assert result.finite == 0 and torch.equal(weights(model), start)


def test_the_loss_scale_cancels_out(tiny_config):
    """The same float16 gradient whatever the scale, clipped after unscaling."""
    norms = []
    for scale in (2.0**4, 2.0**10):
        model = randomise(VisionTransformer(tiny_config, 16, 5)).train()
        scaler = make_scaler("cpu", torch.float16, scale)
        result = train_step(model, make_optimizer(model, "sgd"), scaler, *batch(), lr=0.1, precision=torch.float16)
        assert result.scale.item() == scale == scaler.get_scale()
        norms.append(result.grad_norm.item())
    assert norms[0] == pytest.approx(norms[1], rel=1e-2)


def test_dropout_depends_on_seed_step_and_micro_batch_alone(tiny_config):
    config = replace(tiny_config, dropout_rate=0.3)
    first, *_ = run(config, 2, micro_batches=2)
    torch.rand(17)  # whatever else draws from the global generator
    second, *_ = run(config, 2, micro_batches=2)
    assert torch.equal(weights(first), weights(second))
    other, *_ = run(config, 2, micro_batches=4)
    assert not torch.equal(weights(first), weights(other))


def test_loss_and_accuracy_are_those_before_the_update(tiny_config):
    model = randomise(VisionTransformer(tiny_config, 16, 5))
    x, y = batch()
    logits = model(x)
    _, _, (result,) = run(tiny_config, 1)
    assert result.loss.item() == pytest.approx(torch.nn.functional.cross_entropy(logits, y).item(), rel=1e-6)
    assert result.accuracy.item() == pytest.approx((logits.argmax(1) == y).float().mean().item())
