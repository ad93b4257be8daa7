"""torchrun's processes: start, reduce, gather, end. One process alone is a world of one, for which nothing is sent."""

import os
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

BUCKET = 64 << 20  # bytes that are sent at a time: few messages, little memory beside the gradients


class World(NamedTuple):
    """This process among those of the run; rank 0 speaks and writes."""
    rank: int = 0
    size: int = 1
    local_rank: int = -1  # its GPU; -1: none was given

    def average(self, tensors: list[Tensor]) -> None:
        """Each tensor becomes its mean over the processes, in place; the sum has the same order in every process."""
        if self.size == 1:
            return
        for bucket in _buckets(tensors):
            flat = _flatten_dense_tensors(bucket)
            dist.all_reduce(flat)
            flat /= self.size
            torch._foreach_copy_(bucket, list(_unflatten_dense_tensors(flat, bucket)))

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


@contextmanager
def processes(use_cuda: bool):
    """The world that torchrun's environment variables describe, as long as the context lasts; else `ALONE`."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield ALONE
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if use_cuda else "gloo")
    try:
        yield World(dist.get_rank(), dist.get_world_size(), int(os.environ["LOCAL_RANK"]))
    finally:
        dist.destroy_process_group()


def _buckets(tensors: list[Tensor]) -> list[list[Tensor]]:
    """The tensors in their order, in groups of one type and about `BUCKET` bytes."""
    groups, size = [[]], 0
    for tensor in tensors:
        if groups[-1] and (size + tensor.nbytes > BUCKET or tensor.dtype != groups[-1][0].dtype):
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.nbytes
    return groups
