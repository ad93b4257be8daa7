import logging

import numpy as np
import pytest
import torch
from PIL import Image

from models.configs import CONFIGS, replace
from models.modeling import VisionTransformer
from models.npz import save_npz

torch.set_num_threads(2)


@pytest.fixture
def tiny_config():
    return replace(CONFIGS["ViT-demo"], name="custom", hidden_size=32, mlp_dim=64, num_heads=2, num_layers=2)


@pytest.fixture
def tiny_model(tiny_config):
    """A small ViT for 16-px images in which every parameter is random and away from zero."""
    return randomise(VisionTransformer(tiny_config, 16, 5))


def randomise(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * 0.1 + 0.05)
    return model.eval()


@pytest.fixture
def image_folder(tmp_path):
    """train/ and test/ with three classes of 16-px PNGs that their colour tells apart: 12 and 4 images a class."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 12), ("test", 4)):
        for label, name in enumerate(("blue", "green", "red")):
            folder = tmp_path / "images" / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 90, (16, 16, 3))
                pixels[..., 2 - label] += 150
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    return tmp_path / "images"


@pytest.fixture
def small_run(image_folder, tiny_config, tmp_path):
    """small_run("--flag", value ...) -> train.main's result for a run of a tiny checkpoint, twelve updates of twelve
    images; flags win over those here."""
    import train

    torch.manual_seed(0)
    save_npz(VisionTransformer(tiny_config, 16, 7), tmp_path / "tiny.npz")

    def run(*argv, name="run"):
        flags = {"--dataset": image_folder, "--pretrained_dir": tmp_path / "tiny.npz", "--img_size": 16,
                 "--num_steps": 12, "--warmup_steps": 2, "--train_batch_size": 12, "--eval_every": 4,
                 "--output_dir": tmp_path / "output", "--name": name, "--precision": "fp32", "--device": "cpu"}
        if "--num_epochs" in argv:
            del flags["--num_steps"], flags["--warmup_steps"], flags["--eval_every"]
        words = [*(word for pair in flags.items() for word in pair), "--no_report", *argv]
        return train.main([str(word) for word in words])
    return run


@pytest.fixture(autouse=True)
def root_logger_as_it_was():
    """The command lines send the log to their stdout, which the next test has not."""
    handlers, level = logging.root.handlers[:], logging.root.level
    yield
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)
