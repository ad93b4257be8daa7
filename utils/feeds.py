"""Settings and data -> the batches that a run sees: of training, of what chooses `best`, and of the test."""

import os
from functools import partial

from utils.batches import EvalBatches, TrainBatches, memory, resident
from utils.data import Data, View
from utils.distributed import World
from utils.settings import Settings


def make_batches(settings: Settings, dataset: Data, model, device,
                 world: World) -> tuple[TrainBatches, EvalBatches, EvalBatches]:
    """(training, selection, test): `best` is chosen on the second, which is the test where nothing is held out."""
    workers = settings.num_workers
    if workers < 0:
        workers = min((os.cpu_count() or 1) // world.local_size or 1, 8)
    look = dict(size=model.img_size, mean=model.config.mean, std=model.config.std, device=device, workers=workers)
    area = dataset.view.min_area if settings.min_area is None else settings.min_area
    view = View(area, dataset.view.flip and not settings.no_flip, settings.pad_crop, settings.randaugment,
                settings.magnitude, settings.mixup, settings.cutmix)
    kept = partial(resident, size=model.img_size, device=device, budget=memory() // 6 // world.local_size)
    train = TrainBatches(kept(dataset.train), batch_size=settings.train_batch_size,
                         seed=settings.seed, training_view=view, rank=world.rank, processes=world.size, **look)
    look |= dict(batch_size=settings.eval_batch_size, keep=True)
    test = EvalBatches(kept(dataset.test), name="test", **look)
    if dataset.val is None:
        return train, test, test
    return train, EvalBatches(kept(dataset.val), name="val", **look), test
