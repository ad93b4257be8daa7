import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.pixels import our_images, their_images
from models import exchange
from utils import data

ROOT = Path(__file__).parent.parent
pytest.importorskip("transformers", reason="transformers is not installed")


def test_images_of_the_model_s_size_are_the_same_pixels_in_both(tiny_model, image_folder):
    test = data.load(str(image_folder)).test
    ours, theirs = our_images(test, tiny_model), their_images(test, tiny_model, list("abcde"))
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


def test_the_script_counts_agreement_over_the_test_images(tiny_model, image_folder, tmp_path):
    exchange.save(tiny_model, tmp_path / "a.safetensors", {"classes": list("abcde")})
    command = [sys.executable, ROOT / "bench" / "pixels.py", tmp_path / "a.safetensors", image_folder]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.startswith("12 images at 16 x 16 px: ") and "for 100.0% of the images" in done.stdout, done
