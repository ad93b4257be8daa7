import math
import time
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import Ridge

from models.configs import replace
from models.modeling import VisionTransformer
from tests.conftest import randomise
from utils.batches import EvalBatches
from utils.data import Split
from utils.probe import DEFINITION, FewShot, accuracy, check, draw, features, few_shot, ridge, solve

BATCHES = partial(EvalBatches, size=(16, 16), batch_size=7, mean=(0.5,) * 3, std=(0.5,) * 3, device="cpu")


def split(labels, classes=5, seed=0):
    """Random images of these classes; each class has its own colour, blurred by noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.as_tensor(labels)
    colours = torch.randint(60, 200, (classes, 3, 1, 1), generator=torch.Generator().manual_seed(99))
    noise = torch.randint(-50, 50, (len(labels), 3, 16, 16), generator=generator)
    return Split((colours[labels] + noise).to(torch.uint8), labels, tuple("abcde"[:classes]))


def clusters(count, classes=10, width=768, spread=1.0, seed=0):
    """(classes * count, width) features around a centre a class, and their labels, mixed."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(classes, width))
    labels = rng.permutation(np.repeat(np.arange(classes), count))
    x = centres[labels] + spread * rng.normal(size=(len(labels), width))
    return torch.from_numpy(x.astype(np.float32)), torch.from_numpy(labels)


def augmented(x, mean, deviation):
    """By hand what the definition says of features: whitened, and a constant 100 behind them."""
    return np.concatenate([(x.double().numpy() - mean) / (deviation + 1e-5), np.full((len(x), 1), 100.0)], axis=1)


# --- The regression --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("solver", ["cholesky", "svd"])
@pytest.mark.parametrize("images, width", [(10, 768), (50, 768), (250, 192), (1000, 192), (193, 192), (192, 192)])
def test_the_solution_is_scikit_learns_on_the_same_augmented_features(images, width, solver):
    x, y = clusters(-(-images // 10), width=width)
    x, y = x[:images] * 3 + 5, y[:images]
    found = augmented(x, x.double().numpy().mean(0), x.double().numpy().std(0))
    targets = 2.0 * np.eye(10)[y] - 1
    expected = Ridge(alpha=2**10, fit_intercept=False, solver=solver).fit(found, targets).coef_.T
    solution = ridge(torch.from_numpy(found), torch.from_numpy(targets)).numpy()
    assert np.abs(solution - expected).max() <= 1e-8 * np.abs(expected).max()

    weight, bias = solve(x, y, 10)  # the same, for features as they are
    outputs = (x.double() @ weight.T + bias).numpy()
    assert np.abs(outputs - found @ expected).max() <= 1e-8 * np.abs(found @ expected).max()


def test_the_solution_is_that_of_the_normal_equations_and_no_other():
    """Zero gradient of |x w - t|^2 + l2 |w|^2, in both forms."""
    for images in (3, 40):
        x, t = torch.randn(images, 12, dtype=torch.float64), torch.randn(images, 4, dtype=torch.float64)
        w = ridge(x, t, 2.0)
        assert (x.T @ (x @ w - t) + 2.0 * w).abs().max() < 1e-12


def test_a_probe_of_separable_features_is_always_right():
    x, y = clusters(50, spread=0.3)
    test_x, test_y = clusters(200, spread=0.3, seed=1)
    for K in (1, 5, 25):
        at = torch.from_numpy(draw(y.numpy(), 10, K, seed=0).flatten())
        assert accuracy(*solve(x[at], y[at], 10), test_x, test_y) == 1.0


def test_features_that_never_change_do_no_harm():
    x, y = clusters(25, spread=0.3)
    x[:, :100] = 3.0
    weight, bias = solve(x, y, 10)
    assert weight.isfinite().all() and weight[:, :100].abs().max() < 1e-6 and accuracy(weight, bias, x, y) == 1.0


def test_all_draws_of_ten_classes_are_solved_and_scored_in_less_than_a_second():
    x, y = clusters(100)
    test_x, test_y = clusters(1000, seed=1)
    started = time.process_time()
    for seed in range(3):
        at = torch.from_numpy(draw(y.numpy(), 10, 25, seed).flatten())
        assert accuracy(*solve(x[at], y[at], 10), test_x, test_y) > 0.9
    assert time.process_time() - started < 1


# --- The draws -------------------------------------------------------------------------------------------------------

def test_a_draw_has_k_different_images_of_each_class_and_follows_from_the_seed():
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(5), 40))
    draws = [draw(labels, 5, 10, seed) for seed in (0, 0, 1, 2)]
    for found in draws:
        assert found.shape == (5, 10) and len(np.unique(found)) == 50
        assert (labels[found] == np.arange(5)[:, None]).all()
    assert np.array_equal(draws[0], draws[1])
    assert not any(np.array_equal(draws[0], other) for other in draws[2:]) and not np.array_equal(draws[2], draws[3])
    assert np.array_equal(draw(labels, 5, 3, seed=2), draws[3][:, :3])


def test_a_draw_is_big_visions():
    """One generator a seed, and of it a permutation of each class in turn, whose first K are taken."""
    labels = np.arange(60) % 3
    rng = np.random.default_rng(1)
    assert np.array_equal(draw(labels, 3, 5, seed=1), [rng.permutation(np.arange(c, 60, 3))[:5] for c in range(3)])


# --- Features --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("size", [None, 8])
def test_features_are_what_the_head_would_see_and_the_model_is_left_as_it_was(tiny_config, size):
    model = randomise(VisionTransformer(replace(tiny_config, representation_size=size), 16, 5)).train()
    head, data = model.head, split(np.arange(20) % 5)
    x, y = features(model, BATCHES(data))
    assert model.head is head and model.training and x.dtype == torch.float32 and torch.equal(y, data.labels)
    assert x.shape == (20, size or 32)
    with torch.no_grad():
        logits = model.eval()(data.images / 127.5 - 1)
        assert torch.allclose(model.head(x), logits, atol=1e-5)


def test_a_model_without_a_head_has_the_same_features(tiny_config, tiny_model):
    bare = VisionTransformer(tiny_config, 16, 0).eval()
    bare.load_state_dict({name: p for name, p in tiny_model.state_dict().items() if not name.startswith("head.")})
    data = split(np.arange(10) % 5)
    assert torch.equal(features(bare, BATCHES(data))[0], features(tiny_model, BATCHES(data))[0])


def test_features_that_are_not_finite_are_refused_and_the_head_is_back(tiny_model):
    head = tiny_model.head
    with torch.no_grad():
        tiny_model.norm.bias[3] = float("nan")
    with pytest.raises(ValueError, match="features are not finite"):
        features(tiny_model, BATCHES(split(np.arange(10) % 5)))
    assert tiny_model.head is head


# --- The probe -------------------------------------------------------------------------------------------------------

def test_the_probe_equals_its_parts_on_the_features_of_all_images(tiny_model):
    """Though it looks at no training image that is not drawn."""
    train, test = split(np.arange(60) % 5), split(np.arange(45) % 5, seed=1)
    looked = []

    def batches(data):
        looked.append(len(data))
        return BATCHES(data)
    found = few_shot(tiny_model, train, test, batches, shots=(1, 3))
    (x, y), (test_x, test_y) = (features(tiny_model, BATCHES(part)) for part in (train, test))
    for K in (1, 3):
        expected = []
        for seed in (0, 1, 2):
            at = torch.from_numpy(draw(y.numpy(), 5, K, seed).flatten())
            expected.append(accuracy(*solve(x[at], y[at], 5), test_x, test_y))
        assert found.accuracies[K] == pytest.approx(expected, abs=1e-12)
    assert found.images == 45 and looked[0] < 46 and looked[1] == 45


def test_accuracy_is_over_the_whole_test_part_and_better_than_chance(tiny_config):
    torch.manual_seed(0)
    model = VisionTransformer(tiny_config, 16, 5)  # colours show even in random features
    found = few_shot(model, split(np.arange(60) % 5), split(np.arange(45) % 5, seed=1), BATCHES, shots=(10,))
    assert all(round(45 * share, 9) == int(round(45 * share, 9)) for share in found.accuracies[10])
    assert found.mean(10) > 0.6


def test_mean_and_spread_are_over_the_draws():
    found = FewShot({1: (0.5, 0.6, 0.7), 5: (0.8, 0.8, 0.8)}, 1000)
    assert found.mean(1) == pytest.approx(0.6) and found.spread(1) == pytest.approx(0.1) and found.spread(5) == 0
    assert str(found) == "1-shot 60.00 ± 10.00 %, 5-shot 80.00 ± 0.00 % of 1,000 test images (3 draws)"
    alone = FewShot({5: (0.8,)}, 10)
    assert math.isnan(alone.spread(5)) and str(alone) == "5-shot 80.00 % of 10 test images (1 draw)"


def test_the_definition_says_what_decides_the_number():
    assert all(words in DEFINITION for words in ("l2 = 2^10", "1e-5", "constant 100", "-1 and 1", "big_vision"))


def test_too_few_images_of_a_class_are_refused_with_its_name_and_both_numbers(tiny_model):
    train = split([0] * 5 + [1] * 9 + [2] * 3 + [3] * 4 + [4] * 5)
    with pytest.raises(ValueError, match="--few_shot 5 draws 5 .* and c has 3: ask for 3 at most"):
        few_shot(tiny_model, train, train, BATCHES, shots=(1, 5))
    check(train, 3)
    with pytest.raises(ValueError, match="and b has 0: add some, or remove the class"):
        check(split([0, 0, 2, 2], 3), 1)


def test_several_labels_an_image_are_refused(tiny_model):
    several = Split(torch.zeros(4, 3, 16, 16, dtype=torch.uint8), torch.ones(4, 5), tuple("abcde"))
    with pytest.raises(ValueError, match="images of one class each"):
        few_shot(tiny_model, several, several, BATCHES, shots=(1,))


def test_an_unreadable_image_is_left_out_of_test_and_refused_in_a_draw(tiny_model, tmp_path):
    files = []
    for i in range(6):
        files.append(tmp_path / f"{i}.png")
        Image.fromarray(np.full((16, 16, 3), 40 * i, dtype=np.uint8)).save(files[-1])
    whole = Split(list(files), torch.arange(6) % 2, ("a", "b"))
    broken = tmp_path / "broken.png"
    broken.write_bytes(files[5].read_bytes()[:40])
    damaged = Split([*files[:5], broken], torch.arange(6) % 2, ("a", "b"))
    assert few_shot(tiny_model, whole, damaged, BATCHES, shots=(1,)).images == 5
    with pytest.raises(ValueError, match="1 of the training images that were drawn cannot be read"):
        few_shot(tiny_model, damaged, whole, BATCHES, shots=(3,))
