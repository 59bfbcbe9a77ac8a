"""The processes of a run: which one this is, what they agree on, and how weights are shared out among them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import InputError
from ..model import backbones
from .objective import Objective


@dataclass(frozen=True)
class Process:
    """The device of this process, and which of how many it is."""

    device: torch.device
    rank: int
    world: int

    @classmethod
    def join(cls, device: str | None, threads: int) -> Process:
        """Join the processes that torchrun started, if it did, and pick the device.

        Args:
            device: cpu, cuda, …; None: a GPU if there is one.
            threads: on a CPU; 0: an equal part of the cores for each process of this machine.

        Raises:
            InputError: there is no such device.
        """
        rank, world, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
        name = device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            chosen = torch.device(name)
        except RuntimeError:
            raise InputError(f"run.device={name!r} is unknown: use cpu or cuda.") from None
        if chosen.type == "cuda":
            if not torch.cuda.is_available():
                raise InputError(f"run.device is {name}, but there is no GPU here: use cpu.")
            chosen = torch.device("cuda", local if chosen.index is None else chosen.index)
            torch.cuda.set_device(chosen)
        else:
            torch.set_num_threads(threads or max(1, len(os.sched_getaffinity(0)) // _local_world()))
        if world > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
        return cls(chosen, rank, world)

    @property
    def first(self) -> bool:
        """Whether this is the process that speaks and writes."""
        return self.rank == 0


def _local_world() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def agree(values: list[float]) -> list[float]:
    """Return what process 0 says: decisions by clock or signal must be the same everywhere."""
    if not dist.is_initialized():
        return values
    box: list[list[float]] = [values]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather(value: Any) -> list[Any]:
    """Return the values of all processes, by rank."""
    if not dist.is_initialized():
        return [value]
    box: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(box, value)
    return box


def shard(objective: Objective, process: Process) -> None:
    """Shard what learns with FSDP2, block by block; a base under LoRA, which both sides may share, stays whole."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = objective.model
    mesh = init_device_mesh(process.device.type, (process.world,))
    whole: set[nn.Parameter] = set()
    for side in ("encoder", "decoder"):
        if model.config.is_frozen(side):
            whole |= {p for p in getattr(model, side).parameters() if not p.requires_grad}
    # the encoder stops before a block that feeds nothing, where sharding would wait for its end
    read = backbones.blocks(model.encoder)[: model.projections.states[-1]]
    for block in (*read, *backbones.blocks(backbones.body(model.decoder))):
        if any(p not in whole for p in block.parameters()):
            fully_shard(block, mesh=mesh, ignored_params=whole)
    fully_shard(objective, mesh=mesh, ignored_params=whole)


def unsharded(tensor: Any) -> Any:
    """Return a sharded tensor put together, on the CPU, other values as they are; every process must call this."""
    if not isinstance(tensor, Tensor):
        return tensor
    full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full.detach().cpu()


def sharded_like(value: Any, like: Tensor) -> Any:
    """Return a whole tensor sharded as another is; other values as they are."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(like, DTensor) or not isinstance(value, Tensor) or value.shape != like.shape:
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)


class Wrapped(nn.Module):
    """A sharded module in a wrapper, so that Trainer leaves it as it is."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, **batch: Any) -> Any:
        """Compute what the module computes."""
        return self.module(**batch)
