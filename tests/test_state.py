"""The state file: whole or not at all, two generations, damage found."""

import os
import resource
from contextlib import contextmanager

import pytest
import torch

from utils import state
from utils.optim import make_optimizer
from utils.state import NEWEST, PREVIOUS, State
from utils.step import make_scaler, train_step


@contextmanager
def room_for(size):
    """No file may grow beyond `size` bytes: a write that would raises OSError, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def content(step):
    generator = torch.Generator().manual_seed(step)
    return {"step": step, "weights": {"a": torch.randn(5000, generator=generator)}, "name": "ä", "list": [1, 2.5, None]}


def test_the_newest_state_is_read_and_the_one_before_kept(tmp_path):
    assert not state.exists(tmp_path)
    for step in (1, 2, 3):
        state.write(tmp_path, content(step))
    assert state.read(tmp_path)["step"] == 3 and torch.equal(state.read(tmp_path)["weights"]["a"],
                                                             content(3)["weights"]["a"])
    assert {path.name for path in tmp_path.iterdir()} == {NEWEST, PREVIOUS}
    (tmp_path / NEWEST).unlink()
    assert state.exists(tmp_path) and state.read(tmp_path)["step"] == 2


@pytest.mark.parametrize("damage", ["cut", "a bit", "the end", "empty", "text", "gone", "other pickle", "a number"])
def test_a_damaged_newest_state_falls_back_to_the_one_before_and_says_so(damage, tmp_path, caplog):
    state.write(tmp_path, content(1))
    state.write(tmp_path, content(2))
    path = tmp_path / NEWEST
    data = bytearray(path.read_bytes())
    if damage == "a bit":
        data[len(data) // 2] ^= 4
    cuts = {"cut": data[:len(data) // 2], "the end": data[:-1], "empty": b"", "text": b"hello"}
    path.write_bytes(cuts.get(damage, data))
    if damage == "gone":
        path.unlink()
    if damage == "other pickle":
        torch.save({"step": 9, "object": os.system}, path)
    if damage == "a number":
        torch.save(7, path)
    assert state.read(tmp_path)["step"] == 1
    assert len(caplog.records) == 1
    words = "is not there" if damage == "gone" else "state.pt is damaged"
    assert words in caplog.text and "state.previous.pt of step 1" in caplog.text


def test_without_a_sound_state_the_error_names_both(tmp_path):
    state.write(tmp_path, content(1))
    (tmp_path / NEWEST).write_bytes(b"x")
    with pytest.raises(ValueError, match=r"no state to continue from: state.pt is damaged .* state.previous.pt is not "
                                         "there"):
        state.read(tmp_path)


def test_a_state_of_another_format_is_refused(tmp_path):
    torch.save({"format": 99, "step": 1}, tmp_path / NEWEST)
    with pytest.raises(ValueError, match="another version of this toolkit"):
        state.read(tmp_path)


def test_a_full_disk_at_any_byte_leaves_both_generations_as_they_were(tmp_path):
    state.write(tmp_path, content(1))
    state.write(tmp_path, content(2))
    before = {name: (tmp_path / name).read_bytes() for name in (NEWEST, PREVIOUS)}
    size = len(before[NEWEST])
    limits = [*range(0, size, size // 40), *range(size - 40, size, 3)]
    for limit in limits:
        with room_for(limit), pytest.raises(OSError) as error:
            state.write(tmp_path, content(3))
        assert error.value.errno == 27  # EFBIG
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    with room_for(size + 1000):
        state.write(tmp_path, content(3))
    assert state.read(tmp_path)["step"] == 3 and len(limits) > 50


@pytest.mark.parametrize("name", ["sgd", "narrow", "adam", "adamw"])
def test_a_restored_state_goes_on_to_the_bit(name, tiny_config, tmp_path):
    """Four updates at once, or two, a file and two more, dropout on."""
    from models.configs import replace
    from models.modeling import VisionTransformer

    def fresh():
        torch.manual_seed(0)
        model = VisionTransformer(replace(tiny_config, dropout_rate=0.2), 16, 5)
        optimizer = make_optimizer(model, name.replace("narrow", "sgd"),
                                   momentum_dtype=torch.bfloat16 if name == "narrow" else None)
        return State(model, optimizer, make_scaler("cpu", torch.float32))

    def update(now, steps):
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            images, labels = torch.randn(6, 3, 16, 16, generator=generator), torch.arange(6) % 5
            train_step(now.model, now.optimizer, now.scaler, images, labels, lr=0.01, dropout_seed=(0, step))
            now.step = step
        return now

    whole, half = update(fresh(), range(1, 5)), update(fresh(), range(1, 3))
    half.best = {"step": 1}
    half.remember_best()
    state.write(tmp_path, half.content())
    again = fresh()
    again.restore(state.read(tmp_path))
    update(again, range(3, 5))
    for one, other in ((whole.model.state_dict(), again.model.state_dict()),
                       *zip(whole.optimizer.state_dict()["state"].values(),
                            again.optimizer.state_dict()["state"].values())):
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
        assert [value.dtype for value in one.values()] == [value.dtype for value in other.values()]
    assert torch.equal(again.best_weights["head.weight"], half.best_weights["head.weight"])


def test_best_weights_that_are_the_present_ones_are_not_stored_twice(tiny_model):
    now = State(tiny_model, make_optimizer(tiny_model, "sgd"), make_scaler("cpu", torch.float32), step=4)
    now.best = {"step": 4}
    now.remember_best()
    stored = now.content()
    assert stored["best_weights"] == {}
    now.restore(stored)
    assert all(torch.equal(value, now.best_weights[name]) for name, value in tiny_model.state_dict().items())
    with torch.no_grad():
        tiny_model.head.weight.add_(1)
    kept = tiny_model.head.weight.clone()
    with now.best_in_place():
        assert torch.equal(tiny_model.head.weight, now.best_weights["head.weight"])
    assert torch.equal(tiny_model.head.weight, kept)
