"""Split + settings + step -> batch on the device. Which images are in batch k, and how each is looked at, follows from
(seed, k) alone: there is no shuffled iterator whose history would have to be saved.
"""

import logging
from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from utils.augment import evaluation_taps, gather, stack, training_taps, view
from utils.data import Split, View, decode, decode_all

log = logging.getLogger(__name__)

ORDER, VIEW = 0, 1  # what a generator is for, so that no two uses share a stream


def generator(seed: int, purpose: int, number: int) -> np.random.Generator:
    return np.random.default_rng((seed, purpose, number))


class Batches(Dataset):
    """Batches of one split; item k is (images (B, 3, H, W) float32, labels (B,)) on `device`.

    Images that lie in memory are indexed; files are decoded by `workers` processes when streamed.
    """

    def __init__(self, split: Split, *, size: tuple[int, int], batch_size: int, mean, std, device, workers: int = 0):
        self.split, self.size, self.batch_size = split, size, batch_size
        self.mean, self.std, self.device = mean, std, torch.device(device)
        self.workers = 0 if isinstance(split.images[0], Tensor) else workers

    def indices(self, k: int) -> np.ndarray:
        """Which images are in batch k."""
        raise NotImplementedError

    def taps(self, k: int, sizes: np.ndarray):
        """How they are looked at: (rows, columns) for images of `sizes` (B, 2)."""
        raise NotImplementedError

    def pixels(self, k: int):
        """The part that needs no device: uint8 (B, 3, h, w), taps, labels of batch k."""
        indices = self.indices(k)
        labels = self.split.labels[indices]
        images = self.split.images
        if isinstance(images, Tensor):
            rows, columns = self.taps(k, np.tile(images.shape[2:], (len(indices), 1)))
            return images[torch.from_numpy(indices).to(images.device)], rows, columns, labels
        images = [images[i] if isinstance(images[i], Tensor) else decode(images[i]) for i in indices]
        rows, columns = self.taps(k, np.array([image.shape[1:] for image in images]))
        looked_at = [gather(image, rows.of(b), columns.of(b)) for b, image in enumerate(images)]
        return *stack(*map(list, zip(*looked_at))), labels

    def on_device(self, pixels, rows, columns, labels) -> tuple[Tensor, Tensor]:
        pixels, labels = (t.to(self.device, non_blocking=True) for t in (pixels, labels))
        return view(pixels, rows, columns, self.mean, self.std), labels

    def __getitem__(self, k: int) -> tuple[Tensor, Tensor]:
        return self.on_device(*self.pixels(k))

    def stream(self, start: int, stop: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches start .. stop - 1 in order, decoded ahead by the worker processes where there are files."""
        loader = DataLoader(_Pixels(self), batch_size=None, sampler=range(start, stop), num_workers=self.workers,
                            pin_memory=self.workers > 0 and self.device.type == "cuda")
        try:
            for batch in loader:
                yield self.on_device(*batch)
        except ValueError as error:  # a worker's error comes wrapped in its traceback: keep the sentence
            raise ValueError(str(error).strip().splitlines()[-1].removeprefix("ValueError: ")) from error


class _Pixels(Dataset):
    def __init__(self, batches: Batches):
        self.batches = batches

    def __getitem__(self, k: int):
        return self.batches.pixels(k)


class TrainBatches(Batches):
    """The endless training stream: batch k is positions kB to (k+1)B - 1 of all epochs' permutations, one after the
    other, so every batch is full and no image is favoured."""

    def __init__(self, split: Split, *, seed: int, training_view: View, **kwargs):
        super().__init__(split, **kwargs)
        self.seed, self.training_view = seed, training_view
        self._epoch = (-1, None)

    def indices(self, k: int) -> np.ndarray:
        positions = np.arange(k * self.batch_size, (k + 1) * self.batch_size)
        epochs, places = np.divmod(positions, len(self.split))
        return np.concatenate([self.permutation(e)[places[epochs == e]] for e in np.unique(epochs)])

    def permutation(self, epoch: int) -> np.ndarray:
        if self._epoch[0] != epoch:
            self._epoch = epoch, generator(self.seed, ORDER, int(epoch)).permutation(len(self.split))
        return self._epoch[1]

    def taps(self, k: int, sizes: np.ndarray):
        rng = generator(self.seed, VIEW, k)
        return training_taps(rng, sizes, self.size, self.training_view.min_area, self.training_view.flip)


class EvalBatches(Batches):
    """Each image once, in order, squashed to the square; the last batch is as small as it comes."""

    def __init__(self, split: Split, *, name: str = "test", **kwargs):
        super().__init__(split, **kwargs)
        self.name = name  # under which its metrics are logged

    def __len__(self) -> int:
        return -(-len(self.split) // self.batch_size)

    def indices(self, k: int) -> np.ndarray:
        return np.arange(k * self.batch_size, min((k + 1) * self.batch_size, len(self.split)))

    def taps(self, k: int, sizes: np.ndarray):
        return evaluation_taps(sizes, self.size)


def resident(split: Split, device, budget: int = 4 << 30) -> Split:
    """The split with its images decoded once, if they fit into `budget` bytes: on the device where all have one size.

    A split that is larger comes back as it is, to be streamed.
    """
    images = split.images
    if not isinstance(images, Tensor):
        if decoded_bytes(images) > budget:
            log.info("%s images are too many to keep in memory: worker processes will decode them.", f"{len(split):,}")
            return split
        images = decode_all(images)
        if len({image.shape for image in images}) > 1:
            return Split(images, split.labels, split.classes)
        images = torch.stack(images)
    if torch.device(device).type == "cuda" and images.numel() < torch.cuda.mem_get_info(device)[0] // 4:
        images = images.to(device)
    return Split(images, split.labels, split.classes)


def decoded_bytes(paths: list) -> int:
    """About how many bytes the files have when decoded: from the headers of at most 200 of them."""
    sample = paths[::max(len(paths) // 200, 1)]
    total = 0
    for path in sample:
        try:
            with Image.open(path) as image:
                total += image.width * image.height * 3
        except (OSError, ValueError, Image.DecompressionBombError):
            continue  # decoding will name the file
    return total * len(paths) // len(sample)
