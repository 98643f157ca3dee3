"""Processes that torchrun started to train one model: each computes its part of every batch.

torch's DistributedDataParallel averages their gradients. What mixes the images of a batch, that is
the losses' means and batch norm's statistics, is summed over all processes in between: every one
has the loss of the whole batch, and the average is its gradient, however the batch is split.

Without torchrun there is one process, and nothing here does anything.
"""

import contextlib
import itertools
import logging
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from training.errors import TrainingError

_joined = itertools.count()  # a second time may not meet what the first left in the store


@contextlib.contextmanager
def processes() -> Iterator[None]:
    """Join the other processes of torchrun, if any.

    The first to fail raises its error; the others, which can't go on without it, end in silence.
    """
    if not dist.is_torchelastic_launched() or os.environ["WORLD_SIZE"] == "1":
        yield
        return
    store, rank, size = next(rendezvous("env://"))
    store = dist.PrefixStore(f"training {next(_joined)}", store)  # type: ignore[attr-defined]
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    if not first():
        logging.disable(logging.WARNING)
    try:
        yield
    except BaseException:
        if store.add("failed", 1) > 1:
            raise SystemExit(1) from None
        raise
    agreed(False)  # torchrun ends the others as soon as one ends with an error
    dist.destroy_process_group()


def count() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def count_here() -> int:
    """Processes on this machine, which share its memory and its disk."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if count() > 1 else 1


def first() -> bool:
    """Whether this is the process that writes checkpoints and speaks."""
    return count() == 1 or dist.get_rank() == 0


def cuda_device() -> torch.device:
    """This process's own GPU; raises TrainingError where there are fewer than processes."""
    if count() == 1:
        return torch.device("cuda")
    if count_here() > torch.cuda.device_count():
        raise TrainingError(
            f"{count_here()} processes on this machine need a CUDA device each, torch finds "
            f"{torch.cuda.device_count()}: lower --nproc-per-node"
        )
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    return device


def part(size: int) -> slice:
    """Which images of a batch this process computes; none where there are fewer than processes."""
    if count() == 1:
        return slice(0, size)
    return slice(dist.get_rank() * size // count(), (dist.get_rank() + 1) * size // count())


def agreed(flag: bool) -> bool:
    """Whether any process says yes. All wait here for each other."""
    if count() == 1:
        return flag
    yes = torch.tensor(int(flag))
    dist.all_reduce(yes, dist.ReduceOp.MAX)
    return bool(yes)


def require_same(what: str, value: str) -> None:
    """Raises TrainingError where processes differ in `value`. All wait here for each other."""
    if count() == 1:
        return
    values: list[Any] = [None] * count()
    dist.all_gather_object(values, value)
    if len(set(values)) > 1:
        raise TrainingError(
            f"the processes see different {what}: they must share the folders of data and models"
        )


def mean(x: Tensor) -> Tensor:
    """Mean over the parts (B, ...) that all processes have of a batch: one scalar for all."""
    if count() == 1:
        return x.mean()
    sums = _sum(torch.stack([x.sum(), x.new_tensor(x.numel())]))
    return sums[0] / sums[1]


def _sum(x: Tensor) -> Tensor:
    summed: Tensor = _Sum.apply(x)
    return summed


class _Sum(torch.autograd.Function):
    """Sum over processes. Each has a gradient of it, the summed one of all that follows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        return gradient


def parallel(objective: nn.Module, *trained: nn.Module) -> nn.Module:
    """The module whose gradients are the whole batch's; batch norms in `trained` see it as well."""
    if count() == 1:
        return objective
    for module in trained:
        _synchronise_batch_norm(module)
    # Running statistics are equal everywhere, so that none need be sent.
    return DistributedDataParallel(objective, broadcast_buffers=False)


def _synchronise_batch_norm(module: nn.Module) -> None:
    """In place: weights, statistics and their names stay as they are."""
    if next(module.parameters()).is_cuda:
        nn.SyncBatchNorm.convert_sync_batchnorm(module)  # type: ignore[no-untyped-call]
        return
    for child in module.modules():
        if isinstance(child, nn.BatchNorm2d):
            child.__class__ = SynchronisedBatchNorm


class SynchronisedBatchNorm(nn.BatchNorm2d):
    """nn.SyncBatchNorm for the CPU, where torch's refuses to run."""

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        values = x.float()
        places = values.new_tensor([values[:, 0].numel()])
        sums = _sum(torch.cat([values.sum((0, 2, 3)), places]))  # (C + 1,)
        mean, number = sums[:-1] / sums[-1], sums[-1]
        centred = values - mean[:, None, None]
        # In a second pass: a mean of squares less the mean's square would lose float32's digits.
        variance = _sum(centred.square().sum((0, 2, 3))) / number
        with torch.no_grad():
            momentum = self.momentum or 0.0
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, momentum)
            self.running_var.lerp_(variance * number / (number - 1), momentum)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)
