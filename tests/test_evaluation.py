import pytest
import torch
import torch.nn.functional as F

from models.configs import replace
from models.modeling import VisionTransformer
from utils.batches import EvalBatches
from utils.data import Split
from utils.evaluation import evaluate


@pytest.fixture
def split():
    generator = torch.Generator().manual_seed(0)
    return Split(torch.randint(0, 256, (10, 3, 16, 16), generator=generator, dtype=torch.uint8),
                 torch.arange(10) % 5, tuple("abcde"))


def test_every_image_counts_once_whatever_the_batch_size(tiny_model, split):
    logits = tiny_model((split.images.float() - 127.5) / 127.5)
    accuracy = (logits.argmax(1) == split.labels).float().mean().item()
    loss = F.cross_entropy(logits, split.labels).item()
    for batch_size in (3, 4, 10, 64):
        found = evaluate(tiny_model, EvalBatches(split, size=(16, 16), batch_size=batch_size, mean=(0.5,) * 3,
                                                 std=(0.5,) * 3, device="cpu"))
        assert found.images == 10 and found.accuracy == pytest.approx(accuracy)
        assert found.loss == pytest.approx(loss, rel=1e-5)


def test_dropout_is_off_while_evaluating(tiny_config, split):
    model = VisionTransformer(replace(tiny_config, dropout_rate=0.5), 16, 5).train()
    torch.nn.init.normal_(model.head.weight)
    batches = EvalBatches(split, size=(16, 16), batch_size=4, mean=(0.5,) * 3, std=(0.5,) * 3, device="cpu")
    assert evaluate(model, batches) == evaluate(model, batches)


def test_the_model_comes_back_in_the_mode_it_came_in(tiny_model, split):
    batches = EvalBatches(split, size=(16, 16), batch_size=4, mean=(0.5,) * 3, std=(0.5,) * 3, device="cpu")
    for mode in (True, False):
        tiny_model.train(mode)
        evaluate(tiny_model, batches)
        assert tiny_model.training is mode
