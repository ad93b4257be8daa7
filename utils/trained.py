"""A checkpoint of any layout, or the folder of a run -> a model that can be asked, with the names of its classes."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from models import exchange, sources
from models.modeling import VisionTransformer
from utils.batches import PART, EvalBatches
from utils.data import Split
from utils.images import decode
from utils.runs import weights_of


@dataclass(frozen=True)
class Trained:
    path: Path                       # of the weights
    model: VisionTransformer         # float32, in evaluation mode, on its device
    classes: tuple[str, ...] | None  # by the number of the logit; None: the file names none
    multi_label: bool                # an image may have several classes: a sigmoid each instead of one softmax
    about: dict                      # what the file says of itself, {} for most foreign ones; no path in it is followed

    def batches(self, split: Split, device: torch.device, batch_size: int, workers: int) -> EvalBatches:
        """The one way in which images reach a trained model: as in the evaluations of a run; broken ones are skipped.

        workers: -1: one a core, at most 8.
        """
        config = self.model.config
        if workers < 0:  # a few images are decoded before a process has started
            workers = min(os.cpu_count() or 1, 8) if len(split) > PART else 0
        return EvalBatches(split, size=self.model.img_size, mean=config.mean, std=config.std, device=device,
                           batch_size=batch_size, workers=workers)

    def images(self, files: Sequence[str | Path]) -> Tensor:
        """(B, in_chans, H, W) on the model's device: files as `batches` shows them. ValueError: one cannot be read."""
        channels = self.model.config.in_chans
        pixels = [decode(Path(file), channels) for file in files]
        split = Split(pixels, torch.zeros(len(pixels), dtype=torch.int64), self.classes or (), channels)
        return self.batches(split, self.model.pos_embed.device, len(pixels), 0)[0][0]

    def __str__(self) -> str:
        kind = "yes or no for each of " if self.multi_label else ""
        return (f"{self.path}: {self.model.config.name}, {self.model.img_size[0]} x {self.model.img_size[1]} px, "
                f"{kind}{self.model.num_classes:,} classes")


def open_trained(checkpoint: str, device: torch.device, *, weights: str = "auto",
                 img_size: tuple[int, int] | None = None, model_type: str | None = None) -> Trained:
    """checkpoint: a file or Hugging Face folder that `exchange.load` reads, a published `.npz` that is fetched if it
    is not there, or the folder of a run, of which `weights` (auto, best, last or averaged) are taken.

    ValueError or OSError: a sentence; also for weights that are there to be fine-tuned only.
    """
    path = Path(checkpoint)
    if not path.exists() and path.suffix != ".npz":
        raise FileNotFoundError(f"There is no checkpoint and no run at {checkpoint}.")
    path = weights_of(sources.fetch(path), weights)
    if path == Path(checkpoint) and weights != "auto":
        raise ValueError(f"--weights {weights} chooses among the files of a run, and {checkpoint} is no run's folder.")
    model = exchange.load(path, img_size=img_size, config=model_type).eval()
    if not model.num_classes or not (model.head.weight.any() or model.head.bias.any()):
        raise ValueError(f"{path} has {'a head of zeros' if model.num_classes else 'no head'}: it is for fine-tuning "
                         f"only (python train.py --pretrained_dir {path}).")
    about = exchange.read_metadata(path)
    classes = about.get("classes")
    if classes and len(classes) != model.num_classes:
        raise ValueError(f"{path} names {len(classes)} classes, and its head has {model.num_classes}: it was changed "
                         "by hand, or is damaged.")
    return Trained(path, model.to(device), tuple(map(str, classes)) if classes else None,
                   about.get("multi_label") is True, about)
