"""How the split into micro-batches is found and cut finer where memory runs out, without whole runs."""

import logging
import weakref

import pytest
import torch

from models.configs import replace
from models.modeling import VisionTransformer
from tests.conftest import randomise
from tests.test_step import batch, weights
from utils import fitting, resources
from utils.distributed import ALONE, World
from utils.fitting import Fitting, begin, divisors, fewest, finer
from utils.optim import make_optimizer
from utils.settings import Settings
from utils.step import make_scaler, rehearse, train_step

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


class Pair:
    """Two processes, of which the other one has `other` to say wherever it is a number."""
    rank, size = 0, 2

    def __init__(self, other=None):
        self.other = other

    def gather(self, value):
        return [value, value if isinstance(value, str) else self.other]


# One update


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_step_that_is_done_again_is_to_the_bit_one_of_the_finer_split(tiny_config, optimizer):
    """It fails at the end of the second micro-batch's backward pass, with dropout; weights are as before it then."""
    model, other = (randomise(VisionTransformer(replace(tiny_config, dropout_rate=0.3), 16, 5)).train() for _ in "ab")
    before, calls, made = weights(model), [], []

    def last_gradient(gradient):
        calls.append(torch.equal(weights(model), before) and model.head.weight.grad is not None)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    def made_before(module, inputs):
        assert len(calls) != 2 or all(tensor() is None for tensor in made)  # the failed attempt's are gone

    model.cls_token.register_hook(last_gradient)
    model.head.register_forward_pre_hook(made_before)
    model.head.register_forward_hook(lambda module, inputs, output: made.append(weakref.ref(output)))
    split, one = Fitting(2, automatic=True), make_optimizer(model, optimizer)
    scaler, options = make_scaler("cpu", torch.float32), dict(lr=0.1, dropout_seed=(0, 7))
    train_step(model, one, scaler, *batch(), micro_batches=split, **options)
    two = make_optimizer(other, optimizer)
    train_step(other, two, scaler, *batch(), micro_batches=4, **options)
    assert calls == [True] * 6 and split.parts == 4
    assert torch.equal(weights(model), weights(other)) and not torch.equal(weights(model), before)
    for mine, theirs in zip(one.state.values(), two.state.values()):
        assert all(torch.equal(value, theirs[name]) for name, value in mine.items())


def test_other_errors_and_numbers_by_hand_are_not_caught():
    def fail(error):
        def work(parts):
            raise error
        return work
    for automatic, error in ((True, RuntimeError("shape")), (False, torch.OutOfMemoryError("CUDA out of memory"))):
        split = Fitting(1, automatic=automatic)
        with pytest.raises(type(error)):
            split.run(fail(error), lambda: None, 8, 1)
        assert split.parts == 1


@pytest.mark.parametrize("error, full", [
    (torch.OutOfMemoryError("CUDA out of memory"), True), (MemoryError(), True),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 7 bytes"), True),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
    (RuntimeError("shapes cannot be multiplied"), False), (ValueError("can't allocate memory"), False)])
def test_what_is_an_error_of_memory(error, full):
    assert resources.out_of_memory(error) == full


def test_the_next_split_has_at_least_twice_as_many_parts():
    assert [finer(n, 12) for n in (1, 2, 3, 4, 6)] == [2, 4, 6, 12, 12] and finer(3, 15) == 15 and finer(1, 7) == 7
    with pytest.raises(ValueError, match="one image at a time"):
        finer(12, 12)
    assert divisors(12) == [1, 2, 3, 4, 6, 12]


# Where it begins


def test_the_estimate_decides_on_a_cpu_and_processes_share_it(tiny_model, monkeypatch):
    settings = Settings(train_batch_size=32)

    def needs(parts, processes=1):
        return resources.memory(tiny_model, settings, torch.float32, CPU, processes, parts).total
    for parts in (1, 4, 32):
        monkeypatch.setattr(resources, "free_memory", lambda device, parts=parts: 2 * needs(parts))
        found = begin(settings, {}, tiny_model, torch.float32, CPU, ALONE)
        assert (found.parts, found.automatic, found.settled) == (parts, True, True)
    monkeypatch.setattr(resources, "free_memory", lambda device: 0)
    assert begin(settings, {}, tiny_model, torch.float32, CPU, ALONE).parts == 32
    monkeypatch.setattr(resources, "free_memory", lambda device: None)
    assert begin(settings, {}, tiny_model, torch.float32, CPU, ALONE).parts == 1
    monkeypatch.setattr(resources, "free_memory", lambda device: 2 * 2 * needs(2, 2))
    assert [begin(settings, {}, tiny_model, torch.float32, CPU, Pair(n)).parts for n in (1, 2, 8)] == [2, 2, 8]


def test_what_was_saved_holds_as_long_as_devices_and_processes_do(tiny_model, monkeypatch):
    monkeypatch.setattr(resources, "free_memory", lambda device: None)
    settings, saved = Settings(train_batch_size=32), {"micro_batches": 8, "devices": "cpu", "processes": 1}

    def found(saved, settings=settings):
        return begin(settings, saved, tiny_model, torch.float32, CPU, ALONE)
    assert found(saved).parts == 8 and found(saved).state_dict() == saved
    assert found({**saved, "processes": 2}).parts == found({**saved, "devices": "NVIDIA H200"}).parts == 1
    assert found(saved, Settings(train_batch_size=32, gradient_accumulation_steps=2)).state_dict() == {
        **saved, "micro_batches": 2}


def test_processes_agree_on_the_finest_split(caplog):
    split = Fitting(2, automatic=True)
    assert not split.changed
    split.parts = 4
    assert split.changed
    split.agree(Pair(2))
    assert split.parts == 4 and not split.changed and caplog.text == ""
    split.agree(Pair(8))
    assert split.parts == 8 and not split.changed and "is cut into 8 micro-batches instead of 4" in caplog.text


@pytest.mark.parametrize("need, tried, found", [
    (4, [4, 2], 4), (4, [1, 2, 4], 4), (2, [8, 4, 2, 1], 2), (1, [2, 1], 1), (8, [8, 4], 8), (9, [4, 8], None)])
def test_the_fewest_that_fit_are_found_from_any_guess(need, tried, found):
    asked = []
    assert fewest([1, 2, 4, 8], lambda n: asked.append(n) or n >= need, tried[0]) == found
    assert asked == tried


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of 100 bytes as PyTorch would describe it; `gpu["peak"]`: what is taken at most."""
    now = {"peak": 0, "emptied": 0}
    for name, value in {"mem_get_info": lambda device: (70, 100), "memory_reserved": lambda device: 20,
                        "max_memory_allocated": lambda device: now["peak"], "is_initialized": lambda: True,
                        "get_per_process_memory_fraction": lambda device: 0.8,
                        "get_device_name": lambda device: "NVIDIA H200",
                        "reset_peak_memory_stats": lambda device: now.update(peak=0),
                        "empty_cache": lambda: now.update(emptied=now["emptied"] + 1)}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return now


@pytest.mark.parametrize("image, guess, other, parts", [
    (8.0, 1, 1, 1), (8.0, 8, 1, 1), (9.1, 2, 1, 1), (9.3, 2, 1, 2), (12.0, 1, 1, 2), (8.0, 2, 4, 4), (70.0, 1, 1, 8)])
def test_on_a_gpu_the_split_is_tried_within_92_percent_of_what_it_may_take(image, guess, other, parts, gpu, caplog):
    """80 bytes may be taken (a fraction of 0.8 of 100), 73.6 with the margin; 8 images in so many micro-batches."""
    caplog.set_level(logging.INFO)

    def rehearse(parts):
        if image * 8 / parts > 80:
            raise torch.OutOfMemoryError("CUDA out of memory")
        gpu["peak"] = image * 8 / parts
    split = Fitting(guess, automatic=True, settled=False)
    split.settle(rehearse, 8, CUDA, Pair(other))
    assert split.parts == parts and split.settled and not split.changed and gpu["emptied"] > 1 and gpu["peak"] == 0
    only, = caplog.messages
    words = f"16 in {parts} micro-batches of {16 // parts}" if parts > 1 else "16 at once"
    assert only.startswith(f"split    {words} (auto: as few as fit")
    split.settle(None, 8, CUDA, ALONE)  # nothing is tried twice


def test_where_one_image_does_not_fit_on_one_gpu_all_processes_stop(gpu):
    def rehearse(parts):
        raise torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(ValueError, match="one image at a time"):
        Fitting(1, automatic=True, settled=False).settle(rehearse, 8, CUDA, ALONE)
    with pytest.raises(ValueError, match="one image at a time"):
        Fitting(1, automatic=True, settled=False).settle(lambda parts: None, 8, CUDA, Pair(None))


def test_on_a_gpu_the_estimate_is_where_trying_begins(tiny_model, gpu, monkeypatch):
    assert resources.room(CUDA) == 80
    found = begin(Settings(train_batch_size=8), {}, tiny_model, torch.float32, CUDA, ALONE)
    assert found.parts == 8 and not found.settled and found.devices == "NVIDIA H200"
    monkeypatch.setattr(resources, "room", lambda device: 2**40)
    assert begin(Settings(train_batch_size=8), {}, tiny_model, torch.float32, CUDA, ALONE).parts == 1


@pytest.mark.parametrize("parts, seen", [(1, [8]), (2, [4, 4]), (8, [1, 1])])
def test_the_rehearsal_is_of_two_micro_batches_and_changes_nothing(tiny_config, parts, seen):
    model = randomise(VisionTransformer(replace(tiny_config, dropout_rate=0.3), 16, 5)).train()
    before, optimizer, sizes = weights(model), make_optimizer(model, "adamw"), []
    model.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    scaler = make_scaler("cpu", torch.float16)
    rehearse(model, optimizer, scaler, torch.zeros(8, dtype=torch.int64), torch.float16,
             torch.nn.functional.cross_entropy, ALONE, parts)
    assert sizes == seen and torch.equal(weights(model), before) and not optimizer.state
    assert all(p.grad is None for p in model.parameters()) and scaler.get_scale() == 2.0**16


# Several processes


@pytest.mark.parametrize("size, parts", [(2, 8), (4, 4)])
def test_parts_that_a_process_cannot_cut_its_images_into_are_refused_at_the_start(tiny_model, size, parts):
    class Several(World):
        gather = staticmethod(lambda value: [value])
    settings = Settings(train_batch_size=8, gradient_accumulation_steps=parts)
    with pytest.raises(ValueError, match=f"Each of the {size} processes has {8 // size} of .* {parts} equal"):
        begin(settings, {}, tiny_model, torch.float32, CPU, Several(0, size))


def test_where_processes_wait_for_one_another_the_sentence_names_the_split_to_go_on_with():
    with pytest.raises(ValueError, match=r"--resume FOLDER --gradient_accumulation_steps 4\."), \
         fitting.meeting(True, 2, 8):
        raise torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(torch.OutOfMemoryError), fitting.meeting(False, 2, 8):
        raise torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(RuntimeError, match="shape"), fitting.meeting(True, 2, 8):
        raise RuntimeError("shape")
    with pytest.raises(ValueError, match="one image at a time"), fitting.meeting(True, 8, 8):
        raise torch.OutOfMemoryError("CUDA out of memory")
