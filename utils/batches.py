"""Split + settings + step -> batch on the device. Which images are in batch k, and how each is looked at, follows from
(seed, k) alone: there is no shuffled iterator whose history would have to be saved.
"""

import logging
import math
import os
import signal
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from utils import mixing, padding, randaugment
from utils.augment import Taps, box_taps, random_boxes, shrink, singly, stack, view, whole_boxes
from utils.data import Split, View
from utils.device import keep_memory
from utils.images import decode, decode_all, pixels_in

log = logging.getLogger(__name__)

ORDER, BOX, FLIP, CROP, OPS, MIX = range(6)  # what a generator is for, so that no two uses share a stream
PART = 64                    # images that a worker process decodes at a time: bounds the memory that is under way


def generator(seed: int, purpose: int, *numbers: int) -> np.random.Generator:
    return np.random.default_rng((seed, purpose, *numbers))


class Looks(NamedTuple):
    """A part of a batch before it meets the device; where images are at hand already, which ones and their boxes."""
    pixels: Tensor          # uint8 (n, C, h, w), or the indices (n,) of images at hand
    rows: Taps | Tensor     # taps (n, S_h), or boxes (n, 4)
    columns: Taps | Tensor  # taps (n, S_w), or flips (n,)
    labels: Tensor          # (n,), with several labels an image (n, C)
    broken: tuple[str, ...] = ()  # what is wrong with images that were skipped, a sentence each


class Batches:
    """Batches of one split; item k is (images (B, C, H, W) float32, labels (B,)) on `device`.

    Images that lie in memory are looked at by a thread, one batch ahead; files are decoded by `workers` processes.
    mean, std: one value for each of the C channels, on the scale 0 to 1; ValueError where there are more or fewer.
    """

    def __init__(self, split: Split, *, size: tuple[int, int], batch_size: int, mean, std, device, workers: int = 0):
        self.split, self.size, self.batch_size = split, size, batch_size
        self.device = torch.device(device)
        decoded = isinstance(split.images[0], Tensor)
        channels = len(split.images[0]) if decoded else split.channels
        if not channels == len(mean) == len(std):  # one value would be spread over all channels without a word
            raise ValueError(f"The images have {channels} channels, but mean has {len(mean)} values and std "
                             f"{len(std)}: there must be one for each channel.")
        self.mean, self.std = (torch.tensor(v).view(-1, 1, 1).mul(255).to(self.device) for v in (mean, std))
        self.workers = 0 if decoded else workers
        # whether an image is looked at where it lies, and not packed for a journey to the device
        self.at_hand = isinstance(split.images, Tensor) or (decoded and singly(self.device, size))

    def count(self, k: int) -> int:
        """How many images are in batch k."""
        raise NotImplementedError

    def indices(self, k: int) -> np.ndarray:
        """Which ones, (count,)."""
        raise NotImplementedError

    def boxes(self, k: int, part: slice, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """How a part of batch k is looked at: boxes (n, 4) and flips (n,) for images of `sizes` (n, 2)."""
        raise NotImplementedError

    def parts(self, k: int) -> list[slice]:
        """The parts in which batch k is made: all at once where the images are at hand."""
        count = self.count(k)
        step = count if self.at_hand else PART
        return [slice(start, min(start + step, count)) for start in range(0, count, step)]

    def looks(self, k: int, part: slice) -> Looks:
        """A part of batch k, as far as it goes without the device."""
        indices = self.indices(k)[part]
        labels, images = self.split.labels[indices], self.split.images
        if self.at_hand:
            one_size = isinstance(images, Tensor)
            sizes = [images.shape[2:]] * len(indices) if one_size else [images[i].shape[1:] for i in indices]
            boxes, flips = self.boxes(k, part, np.array(sizes))
            return Looks(torch.from_numpy(indices), torch.from_numpy(boxes), torch.from_numpy(flips), labels)
        images, labels, broken = self._decoded(indices)
        boxes, flips = self.boxes(k, part, np.array([image.shape[1:] for image in images]))
        rows, columns = box_taps(torch.from_numpy(boxes), torch.from_numpy(flips), self.size)
        small = [shrink(image, rows.of(b), columns.of(b)) for b, image in enumerate(images)]
        return Looks(*stack(*map(list, zip(*small))), labels, tuple(broken))

    def _decoded(self, indices: np.ndarray) -> tuple[list[Tensor], Tensor, list[str]]:
        """Images that are a list, decoded, their labels, and what is wrong with those for which others stand in."""
        images, labels, broken = [], self.split.labels[indices], []  # labels: a copy of the split's
        for place, i in enumerate(indices):
            try:
                images.append(self._image(i))
            except ValueError as error:
                image, labels[place] = self.stand_in(i, error)
                images.append(image)
                broken.append(str(error))
        return images, labels, broken

    def _image(self, i: int) -> Tensor:
        image = self.split.images[i]
        return image if isinstance(image, Tensor) else decode(image, self.split.channels)

    def stand_in(self, i: int, error: ValueError) -> tuple[Tensor, Tensor | int]:
        """What is looked at instead of image i, which cannot be read, and its label; or the error is raised."""
        raise error

    def on_device(self, parts: list[Looks]) -> tuple[Tensor, Tensor]:
        """The parts of one batch -> images and labels; nothing here waits for the device."""
        views = []
        for pixels, rows, columns, _, broken in parts:
            for reason in broken:  # said here, as worker processes have no log of their own
                log.warning("Skipped: %s", reason)
            if isinstance(rows, Taps):
                pixels = self._send(pixels)
                rows, columns = (Taps(*map(self._send, axis)) for axis in (rows, columns))
            else:
                pixels = self._at_hand(pixels)
                rows, columns = box_taps(self._send(rows), self._send(columns), self.size)
            views.append(view(pixels, rows, columns, *self.scale()))
        return (views[0] if len(views) == 1 else torch.cat(views)), self._send(torch.cat([p.labels for p in parts]))

    def scale(self) -> tuple[Tensor, Tensor]:
        """What is taken away from the pixels of a view, 0 to 255, and what they are divided by."""
        return self.mean, self.std

    def _at_hand(self, indices: Tensor) -> Tensor | list[Tensor]:
        """The images at these positions, on the device."""
        images = self.split.images
        if singly(self.device, self.size):
            return [images[i] for i in indices.tolist()]
        return self._send(images.index_select(0, self._send(indices, images.device)))

    def _send(self, tensor: Tensor, device: torch.device | None = None) -> Tensor:
        device = device or self.device
        if device.type == "cuda" and not tensor.is_cuda:
            tensor = tensor.pin_memory()  # only from pinned memory a copy goes on by itself
        return tensor.to(device, non_blocking=True)

    def __getstate__(self):
        return {**self.__dict__, "mean": None, "std": None}  # on the device, where worker processes have no business

    def made(self, k: int, parts: list[Looks]) -> tuple[Tensor, Tensor]:
        """Batch k of its parts."""
        return self.on_device(parts)

    def __getitem__(self, k: int) -> tuple[Tensor, Tensor]:
        return self.made(k, [self.looks(k, part) for part in self.parts(k)])

    def stream(self, numbers: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of these numbers in order, each made while the one before is used."""
        looks = self._stream_from_processes(numbers) if self.workers else self._stream_from_thread(numbers)
        if self.device.type == "cuda":
            return self._beside(numbers, looks)
        return map(self.made, numbers, looks)  # here, as threads of its own would take the step's cores

    def _beside(self, numbers: Sequence[int], looks: Iterable[list[Looks]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches whose copies and views have a CUDA stream of their own. The host, which waits for nothing, is ahead
        of the device, so they overlap the steps before."""
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))  # resident images may be on their way
        for k, parts in zip(numbers, looks):
            with torch.cuda.stream(side):
                batch = self.made(k, parts)
            main = torch.cuda.current_stream(self.device)
            main.wait_stream(side)
            for tensor in batch:
                tensor.record_stream(main)  # its memory is another batch's only when the steps asked for have read it
            yield batch

    def _stream_from_thread(self, numbers: Sequence[int]) -> Iterator[list[Looks]]:
        with ThreadPoolExecutor(1) as thread:
            ahead = None
            for k in numbers:
                now, ahead = ahead, thread.submit(self._all_looks, k)
                if now:
                    yield now.result()
            if ahead:
                yield ahead.result()

    def _all_looks(self, k: int) -> list[Looks]:
        return [self.looks(k, part) for part in self.parts(k)]

    def _stream_from_processes(self, numbers: Sequence[int]) -> Iterator[list[Looks]]:
        loader = iter(DataLoader(_Parts(self), batch_size=None, sampler=_Numbers(self, numbers),
                                 num_workers=self.workers, pin_memory=self.device.type == "cuda",
                                 worker_init_fn=_start_worker))
        try:
            for k in numbers:
                yield [Looks(*next(loader)) for _ in self.parts(k)]
        except ValueError as error:  # a worker's error comes wrapped in its traceback: keep the sentence
            raise ValueError(str(error).strip().splitlines()[-1].removeprefix("ValueError: ")) from error
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise OSError("A process that decodes images died, most often for lack of memory or of shared memory "
                          "(/dev/shm). Try fewer --num_workers; in Docker a larger --shm-size.") from error
        finally:  # an error's traceback keeps the loader, and its workers ignore the signal by which Python ends them
            loader._shutdown_workers()


def _start_worker(number: int) -> None:
    """A signal to all processes of the run (Ctrl-C) is for the one that trains: it has a step to end and a state to
    save, and ends the workers itself. Memory is kept, as with fresh pages for each a large image takes three times as
    long."""
    keep_memory()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class _Parts(Dataset):
    """What a worker process does: item (k, part) is that part's looks."""

    def __init__(self, batches: Batches):
        self.batches = batches

    def __getitem__(self, item):
        return tuple(self.batches.looks(*item))


class _Numbers:
    """All (k, part) in order, found one after the other: a run may have millions."""

    def __init__(self, batches: Batches, numbers: Sequence[int]):
        self.batches, self.numbers = batches, numbers

    def __iter__(self):
        return ((k, part) for k in self.numbers for part in self.batches.parts(k))


class TrainBatches(Batches):
    """The endless training stream: batch k is positions kB to (k+1)B - 1 of all epochs' permutations, one after the
    other, so every batch is full and no image is favoured.

    For a file that breaks on the way (before the run they are looked at) the next one in the split stands in.
    """

    def __init__(self, split: Split, *, seed: int, training_view: View, rank: int = 0, processes: int = 1, **kwargs):
        super().__init__(split, **kwargs)
        if self.batch_size % processes:
            raise ValueError(f"A batch of {self.batch_size} images cannot be split over {processes} processes.")
        self.seed, self.training_view = seed, training_view
        mine = self.batch_size // processes
        if mine % 2 and (training_view.mixup or training_view.cutmix):
            raise ValueError(f"Mixup and CutMix mix images in pairs, and each process has {mine} of an update's: "
                             "choose another --train_batch_size.")
        if training_view.randaugment and len(self.mean) not in (1, 3):
            raise ValueError(f"RandAugment is for images of 1 or 3 channels, and these have {len(self.mean)}.")
        self.share = slice(rank * mine, (rank + 1) * mine)  # of each batch, which is drawn whole in every process
        self._permutation = (-1, None)  # the last one, to draw it once an epoch

    def count(self, k: int) -> int:
        return self.share.stop - self.share.start

    def indices(self, k: int) -> np.ndarray:
        positions = np.arange(k * self.batch_size, (k + 1) * self.batch_size)[self.share]
        epochs, places = np.divmod(positions, len(self.split))
        return np.concatenate([self.permutation(int(e))[places[epochs == e]] for e in np.unique(epochs)])

    def stand_in(self, i: int, error: ValueError) -> tuple[Tensor, Tensor | int]:
        for other in range(i + 1, i + 20):  # so many in a row are no accident
            with suppress(ValueError):
                return self._image(other % len(self.split)), self.split.labels[other % len(self.split)]
        raise error

    def permutation(self, epoch: int) -> np.ndarray:
        last, order = self._permutation
        if last != epoch:
            order = generator(self.seed, ORDER, epoch).permutation(len(self.split))
            self._permutation = epoch, order
        return order

    def boxes(self, k: int, part: slice, sizes: np.ndarray):
        def draw(attempt):  # for the whole batch, so that no part or size changes another image's numbers
            return generator(self.seed, BOX, k, attempt).random((4, self.batch_size))[:, self.share][:, part]
        if self.training_view.pad_crop:  # is cut, and mirrored, later
            return whole_boxes(sizes[:, 0], sizes[:, 1]), np.zeros(len(sizes), dtype=bool)
        return random_boxes(draw, sizes[:, 0], sizes[:, 1], self.training_view.min_area), self.flips(k)[part]

    def flips(self, k: int) -> np.ndarray:
        """Which images of batch k are mirrored, (count,)."""
        return (generator(self.seed, FLIP, k).random(self.batch_size)[self.share] > 0.5) & self.training_view.flip

    def scale(self) -> tuple[Tensor, Tensor]:
        pixels = self.training_view.pad_crop or self.training_view.randaugment  # are worked on as such
        return (torch.zeros_like(self.mean), torch.ones_like(self.std)) if pixels else super().scale()

    def made(self, k: int, parts: list[Looks]) -> tuple[Tensor, Tensor]:
        """Images cropped and mirrored, changed by RandAugment, normalised, mixed, in this order. All is drawn for the
        whole batch of all processes. Labels of mixed images are shares, (count, C)."""
        v, (images, labels) = self.training_view, self.on_device(parts)
        if v.pad_crop or v.randaugment:
            images = images.round_().byte()
            if v.pad_crop:
                offsets = padding.draw(generator(self.seed, CROP, k), self.batch_size, v.pad_crop)[self.share]
                drawn = map(self._send, map(torch.from_numpy, (offsets, self.flips(k))))
                images = padding.padded_crop(images, *drawn, v.pad_crop)
            if v.randaugment:
                draws = randaugment.draw(generator(self.seed, OPS, k), self.batch_size, v.randaugment)
                images = randaugment.randaugment(images, draws.share(self.share), v.magnitude)
            images = images.float().sub_(self.mean).div_(self.std)
        if v.mixup or v.cutmix:
            how = mixing.draw(generator(self.seed, MIX, k), self.size, v.mixup, v.cutmix)
            images, labels = mixing.mix(images, labels, how, len(self.split.classes))
        return images, labels


class EvalBatches(Batches):
    """Each image once, in order, squashed to the square; the last batch is as small as it comes.

    A file that cannot be read is said and comes as a black image whose label (each of its labels) is -1, so that it
    can be left out. keep: the batches will be asked for again and again, so they are made once if all of them fit.
    """

    def __init__(self, split: Split, *, name: str = "test", keep: bool = False, **kwargs):
        super().__init__(split, **kwargs)
        self.name = name  # under which its metrics are logged
        self.keep, self.kept = keep, {}

    def __getstate__(self):
        return {**super().__getstate__(), "kept": {}}

    def stream(self, numbers: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
        if not self.kept and not (self.keep and self._fits()):
            yield from super().stream(numbers)
            return
        made = super().stream([k for k in numbers if k not in self.kept])
        for k in numbers:
            if k not in self.kept:
                self.kept[k] = next(made)
            yield self.kept[k]

    def _fits(self) -> bool:
        """Whether a sixteenth of the memory has room for the views; those that need no resize are as quickly made."""
        if isinstance(self.split.images, Tensor) and self.split.images.shape[2:] == self.size:
            return False
        needed = 4 * len(self.split) * len(self.mean) * math.prod(self.size)
        return needed <= (torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else memory()) // 16

    def stand_in(self, i: int, error: ValueError) -> tuple[Tensor, Tensor | int]:
        return torch.zeros(self.split.channels, 1, 1, dtype=torch.uint8), -1

    def __len__(self) -> int:
        return -(-len(self.split) // self.batch_size)

    def count(self, k: int) -> int:
        return min(self.batch_size, len(self.split) - k * self.batch_size)

    def indices(self, k: int) -> np.ndarray:
        return k * self.batch_size + np.arange(self.count(k))

    def boxes(self, k: int, part: slice, sizes: np.ndarray):
        return whole_boxes(sizes[:, 0], sizes[:, 1]), np.zeros(len(sizes), dtype=bool)


def resident(split: Split, size: tuple[int, int], device, budget: int | None = None) -> Split:
    """The split with its images decoded once, if they fit into `budget` bytes (a sixth of the memory).

    Images of one size, at most twice `size` (H, W), become one tensor, on the device if it has room; others stay a
    list, from which only the pixels that are looked at travel. A larger split comes back as it is, to be streamed.
    """
    images = split.images
    if not isinstance(images, Tensor):
        if decoded_bytes(images, split.channels) > (memory() // 6 if budget is None else budget):
            log.info("%s images are too many to keep in memory: worker processes will decode them.", f"{len(split):,}")
            return split
        split = replace(split, files=images)
        images = decode_all(images, channels=split.channels)
        shapes = {image.shape for image in images}
        if len(shapes) > 1 or any(n > 2 * s for n, s in zip(images[0].shape[1:], size)):
            return replace(split, images=images)
        images = torch.stack(images)
    if torch.device(device).type == "cuda" and images.numel() < torch.cuda.mem_get_info(device)[0] // 4:
        images = images.to(device)
    return replace(split, images=images)


def memory() -> int:
    """Bytes of main memory; 8 GiB where the system does not tell."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 8 << 30


def decoded_bytes(paths: list, channels: int = 3) -> int:
    """About how many bytes the files have when decoded: from the headers of at most 200 of them."""
    sample = paths[::-(-len(paths) // 200)]
    return sum(map(pixels_in, sample)) * channels * len(paths) // len(sample)
