"""Settings and data -> batches: what chooses `best`, how training images are looked at, how many decode."""

import pytest
import torch

from utils import feeds
from utils.data import Data, Split, View
from utils.distributed import ALONE, World
from utils.settings import Settings


def split(n):
    return Split(torch.zeros(n, 3, 16, 16, dtype=torch.uint8), torch.arange(n) % 2, ("a", "b"))


@pytest.fixture
def made(tiny_model):
    def make(val=None, world=ALONE, **settings):
        data = Data("x", split(12), val, split(4), View(min_area=0.3), "test")
        return feeds.make_batches(Settings(**{"train_batch_size": 4, "num_workers": 0, **settings}), data, tiny_model,
                                  torch.device("cpu"), world)
    return make


def test_best_is_chosen_on_the_held_out_part_or_else_on_the_test(made):
    train, selection, test = made()
    assert selection is test and test.name == "test" and len(test.split) == 4 and len(train.split) == 12
    _, selection, test = made(val=split(2))
    assert selection.name == "val" and len(selection.split) == 2 and test.name == "test"


def test_the_set_says_how_its_images_are_looked_at_and_flags_win(made):
    assert made()[0].training_view == View(min_area=0.3)
    view = made(min_area=0.7, no_flip=True, randaugment=2, magnitude=5, mixup=0.8, cutmix=1.0)[0].training_view
    assert view == View(0.7, False, 0, 2, 5, 0.8, 1.0)
    assert made(pad_crop=4)[0].training_view.pad_crop == 4


@pytest.mark.parametrize("cores, processes, workers", [(4, 1, 4), (32, 1, 8), (8, 4, 2), (1, 2, 1), (None, 1, 1)])
def test_the_cores_of_a_machine_are_shared_by_its_processes(made, monkeypatch, cores, processes, workers):
    seen = []
    monkeypatch.setattr(feeds.os, "cpu_count", lambda: cores)
    monkeypatch.setattr(feeds, "TrainBatches", lambda *_, **look: seen.append(look["workers"]))
    made(num_workers=-1, world=World(local_size=processes))
    assert seen == [workers]
