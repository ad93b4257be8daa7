"""The tools that `bench/compare.py` lets take turns, each as its own users run it, under one interface.

Random initial weights, the same batches, precision and clipping (global norm 1); peers with SGD of momentum 0.9, ours
with what its settings make. A peer imports its package where it is chosen, so that one that is missing fails alone.
"""

import os
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from bench.load import TIMM_NAMES
from bench.pictures import CLASSES, part_of, spread
from bench.turns import Job
from models.configs import get_config
from models.configs import replace as with_values
from utils.evaluation import evaluate

RATE = 1e-3  # learning rate: small, as nothing is learnt here


def decoders() -> int:
    """Worker processes of the peers' loaders: one a core."""
    return min(os.cpu_count() or 1, 16)


class Contestant:
    """`imports`, then `build`; then `logits`, `step`, `stream` and `evaluate` may be called."""

    def __init__(self, job: Job):
        self.job, self.device = job, torch.device(job.device)
        self.precision = getattr(torch, job.precision, None)
        self.micro_batches = job.micro_batches
        self.config = get_config(job.model)
        self.needs_data = job.task in ("loop", "evaluation")
        self.images = job.batch * job.count  # of a round
        if self.needs_data:
            self.classes = sum(entry.is_dir() for entry in os.scandir(part_of(job.data, "train")))
        else:
            self.classes = CLASSES

    def imports(self) -> None:
        """What its users' program has loaded before there is a model."""

    def build(self) -> None:
        """Model, optimiser and, where the task needs them, batches."""
        raise NotImplementedError

    def autocast(self):
        half = self.precision in (torch.bfloat16, torch.float16)
        return torch.autocast(self.device.type, dtype=self.precision) if half else nullcontext()

    def logits(self, images: Tensor) -> Tensor:
        return self.model(images)

    def step(self, images: Tensor, labels: Tensor) -> Tensor:
        """One update; the loss, still on the device."""
        raise NotImplementedError

    def stream(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The `count` batches of a round, from files to tensors on the device."""
        raise NotImplementedError

    def evaluate(self) -> int:
        """Finds out how many of a round's test images the model gets right; how many images they were."""
        raise NotImplementedError


class Ours(Contestant):
    """As `train.py` sets its process up and goes through its loop, without its log."""

    def imports(self) -> None:
        import train
        self.train = train

    def build(self) -> None:
        from models.modeling import VisionTransformer
        from utils.settings import SHORT, resolve

        job, train = self.job, self.train
        settings = self.settings = resolve({
            "dataset": job.data, "pretrained_dir": "none", "train_batch_size": job.batch, "device": job.device,
            "eval_batch_size": job.batch, "precision": SHORT.get(job.precision, job.precision)})
        self.device = train.choose_device(settings.device, settings.local_rank)
        self.precision = train.choose_precision(settings, self.device)
        dropout = self.config.dropout_rate if job.dropout is None else job.dropout
        self.model = VisionTransformer(with_values(self.config, dropout_rate=dropout), job.size, self.classes)
        if self.needs_data:
            self.open(settings)
        self.optimizer = train.make_optimizer(self.model.to(self.device).train(), settings.optimizer,
                                              weight_decay=settings.weight_decay)
        self.scaler = train.make_scaler(self.device.type, self.precision, settings.loss_scale)
        self.criterion = F.cross_entropy
        if job.compiled or (job.as_it_comes and train.choose_compile(
                settings.compile, self.model, self.device, settings.num_steps * settings.train_batch_size)):
            train.compile_blocks(self.model)
        self.done = 0

    def open(self, settings) -> None:
        from utils import data

        found = data.load(self.job.data)
        if self.job.task == "evaluation":
            test = found.test.subset(spread(self.images, len(found.test)))
            found = replace(found, val=None, test=test, train=found.train.subset(range(2)))
        else:
            found = replace(found, val=None, test=found.test.subset(range(1)))
        self.batches, _, self.test = self.train.make_batches(settings, found, self.model, self.device, self.train.ALONE)

    def step(self, images, labels):
        settings = self.settings
        lr = self.train.lr_at(self.done, base=RATE, total=10**6, warmup=0, decay=settings.decay_type)
        self.done += 1
        result = self.train.train_step(
            self.model, self.optimizer, self.scaler, images, labels, lr=lr, precision=self.precision,
            micro_batches=self.micro_batches, criterion=self.criterion, max_grad_norm=settings.max_grad_norm,
            world=self.train.ALONE, dropout_seed=(settings.seed, self.done, 0))
        return result.loss

    def stream(self):
        return self.batches.stream(range(self.done, self.done + self.job.count))

    def evaluate(self):
        return evaluate(self.model, self.test, self.precision).images


class Plain(Contestant):
    """A model in the loop of PyTorch's own tutorials: autocast, backward, clip, SGD; torchvision's transforms image by
    image in the loader's processes."""

    def network(self) -> torch.nn.Module:
        raise NotImplementedError

    def build(self):
        self.model = self.network().to(self.device).train()
        if self.job.compiled:
            self.model.compile()
        self.optimizer = self.make_optimizer()
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == torch.float16)
        self.criterion = F.cross_entropy
        if self.needs_data:
            self.loader = self.make_loader("train" if self.job.task == "loop" else "test")

    def make_optimizer(self):
        return torch.optim.SGD(self.model.parameters(), lr=RATE, momentum=0.9)

    def step(self, images, labels):
        parts, total = self.micro_batches, torch.zeros((), device=self.device)
        self.optimizer.zero_grad()
        for x, y in zip(images.chunk(parts), labels.chunk(parts)):
            with self.autocast():
                loss = self.criterion(self.logits(x), y) / parts
            self.scaler.scale(loss).backward()
            total += loss.detach()
        self.scaler.unscale_(self.optimizer)
        self.clip()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return total

    def clip(self):
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)

    def transform(self, part: str):
        from torchvision import transforms as T

        size, end = self.job.size, [T.ToTensor(), T.Normalize(self.config.mean, self.config.std)]
        if part == "train":
            return T.Compose([T.RandomResizedCrop(size, scale=(0.05, 1.0)), T.RandomHorizontalFlip(), *end])
        return T.Compose([T.Resize((size, size)), *end])

    def make_loader(self, part: str):
        """Of exactly a round's images, so that nothing is prepared between the rounds; the processes stay."""
        from torchvision.datasets import ImageFolder

        files = ImageFolder(part_of(self.job.data, part), self.transform(part))
        return DataLoader(Subset(files, spread(self.images, len(files))), self.job.batch, shuffle=part == "train",
                          num_workers=decoders(), persistent_workers=True, pin_memory=self.device.type == "cuda")

    def stream(self):
        for images, labels in self.loader:
            yield images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)

    @torch.inference_mode()
    def evaluate(self):
        self.model.eval()
        right, seen = torch.zeros((), device=self.device), 0
        for images, labels in self.stream():
            with self.autocast():
                right += (self.logits(images).argmax(dim=1) == labels).sum()
            seen += len(labels)
        self.accuracy = right.item() / seen
        return seen


class Timm(Plain):
    """timm's model."""

    def imports(self):
        import timm
        self.timm = timm

    def network(self):
        from timm.models.vision_transformer import VisionTransformer

        config, size = self.config, self.job.size
        if config.name in TIMM_NAMES:
            return self.timm.create_model(TIMM_NAMES[config.name], num_classes=self.classes, img_size=size)
        return VisionTransformer(img_size=size, patch_size=config.patch_size[0], embed_dim=config.hidden_size,
                                 depth=config.num_layers, num_heads=config.num_heads, num_classes=self.classes,
                                 mlp_ratio=config.mlp_dim / config.hidden_size)


class TimmLoop(Timm):
    """timm's model as its own training script runs it: channels last, its loader, optimiser, loss and schedule.

    Crops and flips are ours, unless `as_it_comes`: then also its jitter of colours and its choice of filters.
    """

    def imports(self):
        super().imports()
        from timm import data, loss, optim, scheduler, utils
        self.data, self.loss, self.optim, self.scheduler, self.utils = data, loss, optim, scheduler, utils

    def build(self):
        if self.device.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = True
            torch.backends.cudnn.benchmark = True
        super().build()
        self.model.to(memory_format=torch.channels_last)
        self.criterion = self.loss.LabelSmoothingCrossEntropy(smoothing=0.1)
        self.schedule, _ = self.scheduler.create_scheduler_v2(
            self.optimizer, sched="cosine", num_epochs=300, step_on_epochs=False, updates_per_epoch=self.job.count)
        self.updates = 0

    def make_optimizer(self):
        return self.optim.create_optimizer_v2(self.model, opt="sgd", lr=RATE, momentum=0.9, weight_decay=2e-5)

    def clip(self):
        self.utils.dispatch_clip_grad(self.model.parameters(), 1.0, mode="norm")

    def step(self, images, labels):
        loss = super().step(images.contiguous(memory_format=torch.channels_last), labels)
        self.updates += 1
        self.schedule.step_update(self.updates)
        return loss

    def make_loader(self, part):
        views = {}
        if part == "train":
            views = dict(interpolation="random") if self.job.as_it_comes else dict(color_jitter=None, scale=(0.05, 1.0))
        files = self.data.create_dataset("", root=str(part_of(self.job.data, part)), search_split=False)
        mine = Subset(files, spread(self.images, len(files)))
        loader = self.data.create_loader(
            mine, (3, self.job.size, self.job.size), self.job.batch, is_training=part == "train", mean=self.config.mean,
            std=self.config.std, num_workers=decoders(), device=self.device, pin_memory=self.device.type == "cuda",
            **views)
        files.transform = mine.transform  # it was given to the part, and is asked of the whole
        return loader

    def stream(self):
        return iter(self.loader)  # on the device already


class Transformers(Plain):
    """Hugging Face's ViT of the same sizes."""

    def imports(self):
        import transformers
        self.make, self.sizes = transformers.ViTForImageClassification, transformers.ViTConfig  # loaded when named

    def network(self):
        config = self.config
        if config.resnet is not None:
            raise NotImplementedError("it has no hybrids")
        return self.make(self.sizes(
            hidden_size=config.hidden_size, num_hidden_layers=config.num_layers, num_labels=self.classes,
            num_attention_heads=config.num_heads, intermediate_size=config.mlp_dim, image_size=self.job.size,
            patch_size=config.patch_size[0]))

    def logits(self, images):
        return self.model(images).logits


class Torchvision(Plain):
    """torchvision's ViT."""

    def imports(self):
        import torchvision
        self.torchvision = torchvision

    def network(self):
        names = {"ViT-B_16": "vit_b_16", "ViT-B_32": "vit_b_32", "ViT-L_16": "vit_l_16", "ViT-L_32": "vit_l_32",
                 "ViT-H_14": "vit_h_14"}
        if self.job.model not in names:
            raise NotImplementedError(f"it has no {self.job.model}")
        return getattr(self.torchvision.models, names[self.job.model])(num_classes=self.classes,
                                                                       image_size=self.job.size)


class Loop2020(Plain):
    """The model, the loader and the loop of 2020: the loss is read at each step."""

    def network(self):
        from bench.vit2020 import ViT2020
        return ViT2020(self.config, self.job.size, self.classes)

    def build(self):
        super().build()
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1 / (1 + 1e-6 * step))

    def transform(self, part):
        from torchvision import transforms as T

        size, end = self.job.size, [T.ToTensor(), T.Normalize(self.config.mean, self.config.std)]
        crop = T.RandomResizedCrop((size, size), scale=(0.05, 1.0)) if part == "train" else T.Resize((size, size))
        return T.Compose([crop, *end])

    def step(self, images, labels):
        loss = super().step(images, labels)
        self.read = loss.item()
        self.schedule.step()
        return loss

    @torch.no_grad()
    def evaluate(self):
        self.model.eval()
        predicted, self.loss = [], 0.0
        for images, labels in self.stream():
            with self.autocast():
                logits = self.logits(images)
            self.loss += F.cross_entropy(logits.float(), labels).item()
            predicted.extend(logits.argmax(dim=-1).cpu().numpy())
        return len(predicted)


CONTESTANTS = {"ours": Ours, "timm": Timm, "timm loop": TimmLoop, "transformers": Transformers,
               "torchvision": Torchvision, "2020": Loop2020}


# --- the views of a batch alone ---------------------------------------------------------------------------------------

def our_views(job: Job):
    """A function of k -> batch k, of images that are decoded already."""
    from types import SimpleNamespace

    import train
    from utils import data
    from utils.settings import resolve

    settings = resolve({"dataset": job.data, "train_batch_size": job.batch, "num_workers": 0})
    device = train.choose_device("cpu")
    model = SimpleNamespace(img_size=(job.size, job.size), config=get_config(job.model))
    batches, *_ = train.make_batches(settings, data.load(job.data), model, device, train.ALONE)
    return batches.__getitem__


def per_image_views(job: Job):
    """The same of torchvision's transforms, one decoded Pillow image after the other."""
    from torchvision.datasets import ImageFolder

    files = ImageFolder(part_of(job.data, "train"))
    pictures = [files[i][0] for i in spread(min(job.batch * job.count, len(files)), len(files))]
    look = partial(Plain.transform, Plain(job))("train")

    def batch(k: int) -> Tensor:
        return torch.stack([look(pictures[i % len(pictures)]) for i in range(k * job.batch, (k + 1) * job.batch)])
    return batch


VIEWS = {"ours": our_views, "torchvision": per_image_views}
