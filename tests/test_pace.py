"""A measured step is that of training, and ends when the device has finished."""

import time

import torch

from models.configs import CONFIGS, replace
from utils import pace
from utils.device import Computing
from utils.settings import Settings


def speed(monkeypatch, seconds, limit=None):
    """What is measured where a step takes so long for each image; and the batches of the steps."""
    batches = []

    def train_step(network, optimizer, scaler, images, labels, **rest):
        batches.append(len(images))
        time.sleep(seconds * len(images))
        return type("Result", (), {"loss": torch.zeros(())})
    monkeypatch.setattr(pace, "train_step", train_step)
    if limit:
        monkeypatch.setattr(pace.resources, "activations", lambda model, images, *_: images)
        monkeypatch.setattr(pace.resources, "free_memory", lambda device: 2 * limit + 1)
    config = replace(CONFIGS["ViT-demo"], hidden_size=16, mlp_dim=16, num_heads=1, num_layers=1)
    computing = Computing(torch.device("cpu"), torch.float32)
    return pace.images_per_second(config, (8, 8), Settings(), computing), batches


def test_the_batch_is_as_large_as_time_and_memory_allow(monkeypatch):
    monkeypatch.setattr(pace, "SECONDS", 0.2)
    rate, batches = speed(monkeypatch, 0.01)
    assert batches[:2] == [1, 1] and batches[2:] == 6 * batches[-1:] and 4 <= batches[-1] <= 16  # a busy machine: fewer
    assert 30 < rate <= 100  # sleeping takes longer rather than shorter
    _, batches = speed(monkeypatch, 0.0, limit=4)
    assert batches[-1] == 4


def test_a_real_step_is_measured(monkeypatch):
    config = replace(CONFIGS["ViT-demo"], hidden_size=16, mlp_dim=16, num_heads=1, num_layers=1)
    monkeypatch.setattr(pace, "SECONDS", 0.01)
    assert pace.images_per_second(config, (8, 8), Settings(), Computing(torch.device("cpu"), torch.float32)) > 1
