import subprocess
import sys

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from models.configs import get_config, replace
from models.modeling import VisionTransformer
from tests.conftest import randomise
from utils import device
from utils.device import choose_compile, choose_device, choose_precision, compile_blocks, fit_threads, training_flops
from utils.optim import make_optimizer
from utils.settings import Settings
from utils.step import make_scaler, train_step


def test_fp16_on_a_cpu_is_bfloat16_where_the_processor_has_it(monkeypatch, caplog):
    caplog.set_level("INFO")
    cpu = torch.device("cpu")
    for native, dtype, words in ((True, torch.bfloat16, "bfloat16 instead"), (False, torch.float32, "float32 instead")):
        monkeypatch.setattr("utils.device._cpu_has_bf16", lambda native=native: native)
        assert choose_precision(Settings(fp16=True), cpu) == dtype
        assert words in caplog.records[-1].message
        assert choose_precision(Settings(), cpu) == dtype
        assert choose_precision(Settings(precision="fp32"), cpu) == torch.float32
        assert choose_precision(Settings(bf16=True), cpu) == torch.bfloat16  # asked for: slow, but done


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_asking_for_a_gpu_that_is_not_there_is_refused():
    assert choose_device("auto") == torch.device("cpu")
    with pytest.raises(ValueError, match="--device cuda was asked for"):
        choose_device("cuda")


def test_an_image_costs_vit_b_16_105_gflop():
    """Forwards 17.6 GMAC (He and others count 17.58 without the softmax), twice that backwards."""
    with torch.device("meta"):
        model = VisionTransformer(get_config("ViT-B_16"), 224, 10)
    assert training_flops(model) / 1e9 == pytest.approx(105.4, abs=0.05)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # dynamo looks at it itself
def test_blocks_compile_whole_and_train_alike(tiny_config):
    """One program for all blocks but the last, without a break (fullgraph), and the same numbers."""
    torch.manual_seed(0)
    images, labels = torch.randn(8, 3, 16, 16), torch.arange(8) % 5
    losses = {}
    for compiled in (False, True):
        model = randomise(VisionTransformer(replace(tiny_config, num_layers=4), 16, 5)).train()
        if compiled:
            torch._dynamo.reset()
            counter = CompileCounterWithBackend("aot_eager")
            compile_blocks(model, backend=counter, fullgraph=True)
        optimizer, scaler = make_optimizer(model, "sgd"), make_scaler("cpu", torch.float32)
        losses[compiled] = [train_step(model, optimizer, scaler, images, labels, lr=0.1).loss.item() for _ in range(4)]
    assert losses[True] == pytest.approx(losses[False], rel=1e-5) and counter.frame_count == 2


def test_compilation_is_for_gpus_unless_it_is_asked_for(tiny_model):
    cpu = torch.device("cpu")
    assert [choose_compile(asked, tiny_model, cpu, 10**9) for asked in ("auto", "on", "off")] == [False, True, False]


def test_on_a_gpu_a_run_compiles_that_is_long_enough_to_earn_it_back(tiny_model, monkeypatch):
    rate, gpu = 10.0**12, torch.device("cuda")
    monkeypatch.setattr(device, "has_triton", lambda: True)
    monkeypatch.setattr(device, "matrix_rate", lambda device: rate)
    seconds = device.COMPILING / device.COMPILED_SAVES
    images = int(seconds * device.UTILISATION * rate / training_flops(tiny_model))
    assert [choose_compile("auto", tiny_model, gpu, n) for n in (images - 9, images + 9)] == [False, True]
    assert not choose_compile("off", tiny_model, gpu, 10 * images)
    monkeypatch.setattr(device, "has_triton", lambda: False)
    assert not choose_compile("auto", tiny_model, gpu, 10 * images)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's mallopt")
def test_freed_memory_stays_with_the_process():
    """Blocks of 64 MB, taken and freed again and again, are cleared by the system once (a page fault per 4 KB)."""
    program = """
import resource, sys, torch
from utils.device import keep_memory
if sys.argv[1] == "kept": keep_memory()
def faults(times):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times): torch.ones(16 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults(20); print(faults(10))  # the allocator needs some to settle
"""
    kept, fresh = (int(subprocess.run([sys.executable, "-c", program, word], capture_output=True, text=True,
                                      check=True).stdout) for word in ("kept", "fresh"))
    assert kept < fresh / 20 and fresh > 1000


@pytest.mark.parametrize("limit, threads", [("150000 100000", 2), ("100000 100000", 1), ("800000 100000", 2),
                                            ("max 100000", 2), (None, 2)])
def test_threads_keep_to_the_limit_of_a_container(tmp_path, monkeypatch, limit, threads):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if limit:
        (tmp_path / "cpu.max").write_text(limit + "\n")
    torch.set_num_threads(2)
    try:
        fit_threads(tmp_path / "cpu.max")
        assert torch.get_num_threads() == threads
        torch.set_num_threads(2)
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
        fit_threads(tmp_path / "cpu.max")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(2)
