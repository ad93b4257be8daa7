"""torchrun's processes: start, reduce, gather, end. One process alone is a world of one, for which nothing is sent."""

import os
import warnings
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


class World(NamedTuple):
    """This process among those of the run; rank 0 speaks and writes."""
    rank: int = 0
    size: int = 1
    local_rank: int = -1  # its GPU; -1: none was given
    local_size: int = 1   # processes on this machine, which share its processors

    def parallel(self, model: nn.Module, example: Tensor) -> nn.Module:
        """The model, whose backward pass averages the gradients over the processes as they come (DDP).

        DDP orders what it sends by its first backward pass, and sums depend on that order: this one, of an `example`
        (1, C, H, W), comes before all steps, so that a run that is continued adds up as one that never stopped.
        """
        if self.size == 1:
            return model
        warnings.filterwarnings("ignore", "Grad strides do not match")  # of the class token: 1 x 1 x D, any will do
        network = DistributedDataParallel(model, gradient_as_bucket_view=True)
        with torch.compiler.set_stance("force_eager"):  # or blocks were compiled for one image, then for any number
            network(example).sum().backward()
        model.zero_grad(set_to_none=True)
        return network

    def average(self, numbers: list[Tensor]) -> None:
        """A few small tensors of one type become their means over the processes, in place, in one message."""
        if self.size == 1:
            return
        flat = torch.cat([n.flatten() for n in numbers])
        dist.all_reduce(flat)
        for number, mean in zip(numbers, flat.div_(self.size).split([n.numel() for n in numbers])):
            number.copy_(mean.view_as(number))

    def any(self, *flags: bool) -> list[bool]:
        """Which of the flags is raised in any process. Over main memory, so that no process waits for its GPU."""
        if self.size == 1:
            return list(flags)
        raised = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(raised, op=dist.ReduceOp.MAX)
        return raised.bool().tolist()

    def gather(self, value: Any) -> list[Any]:
        """The value of every process, by rank."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    @contextmanager
    def first(self):
        """Rank 0 does what is inside before the others do, who may then find what it has made or fetched."""
        if self.rank and self.size > 1:
            dist.barrier()
        try:
            yield
        finally:  # also after an error, which the others will then meet themselves
            if not self.rank and self.size > 1:
                dist.barrier()


ALONE = World()


def lost(error: RuntimeError) -> bool:
    """Whether this is how a process learns that another one of its run is gone."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return False
    gone = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "failed to recv", "Timed out")
    return isinstance(error, dist.DistBackendError) or any(words in str(error) for words in gone)


def launcher() -> list[str]:
    """What starts as many processes as there are: python, or torchrun."""
    size, here = (int(os.environ.get(name, 1)) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if size == 1:
        return ["python"]
    machines = ["--nnodes", str(size // here)] if size > here else []
    return ["torchrun", *machines, "--nproc_per_node", str(here)]


@contextmanager
def processes(use_cuda: bool):
    """The world that torchrun's environment variables describe, as long as the context lasts; else `ALONE`."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield ALONE
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if use_cuda else "gloo")
    try:
        yield World(dist.get_rank(), dist.get_world_size(), int(os.environ["LOCAL_RANK"]),
                    int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size())))
    finally:
        dist.destroy_process_group()
