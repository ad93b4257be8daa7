"""Model + split -> metrics, each image counted once."""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from utils.batches import EvalBatches


class Metrics(NamedTuple):
    accuracy: float  # share of images whose largest logit is their class, 0 to 1
    loss: float      # mean cross-entropy over the images
    images: int


@torch.no_grad()
def evaluate(model, batches: EvalBatches, precision: torch.dtype = torch.float32) -> Metrics:
    """Accuracy and loss over all images of the split. Google drops the last partial batch; here it counts.

    The model comes back in the mode, training or evaluation, in which it came.
    """
    training = model.training
    model.eval()
    correct, loss = (torch.zeros((), dtype=torch.float64, device=batches.device) for _ in range(2))
    for images, labels in batches.stream(range(len(batches))):
        with torch.autocast(batches.device.type, dtype=precision, enabled=precision != torch.float32):
            logits = model(images)
        correct += (logits.argmax(dim=1) == labels).sum()
        loss += F.cross_entropy(logits.float(), labels, reduction="sum")
    model.train(training)
    count = len(batches.split)
    return Metrics(correct.item() / count, loss.item() / count, count)
