"""The machine: device, precision, and the ranks of a torchrun world. A world of one needs none of torch.distributed."""

from __future__ import annotations

import gc
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from nanoqwen.errors import WorldError

PATIENCE = timedelta(hours=4)  # that ranks wait for each other: one prepares the data, or writes a large checkpoint


@dataclass(frozen=True)
class World:
    rank: int  # of this process among all
    local_rank: int  # on this machine
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def pick_device(name: str) -> torch.device:
    """`auto` is the first CUDA device, else an Apple GPU, else the CPU."""
    if name != "auto":
        return torch.device(name)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def name_of(device: torch.device) -> str:
    """What a person calls it: the name of a GPU, or that of a CPU with the threads that compute."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return "Apple GPU"
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            name = next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), name)
    except OSError:  # no Linux
        pass
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' * (threads > 1)}"


def pick_dtype(name: str, device: torch.device) -> tuple[torch.dtype, str]:
    """(dtype to compute in, why). `auto` is the narrowest that the device is fast at."""
    if name != "auto":
        return getattr(torch, name), "as asked"
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device) >= (8, 0):
            return torch.bfloat16, "this GPU has bf16 matrix units"
        return torch.float16, "this GPU is older than bf16 matrix units"
    if device.type == "mps":
        return torch.float32, "safe on every Apple GPU"
    # Without these instructions a bf16 matrix product takes about five times as long as an fp32 one.
    features = getattr(torch.cpu, "get_capabilities", dict)()
    if features.get("amx_bf16") or features.get("avx512_bf16"):
        return torch.bfloat16, "this CPU has bf16 instructions"
    return torch.float32, "this CPU has no bf16 instructions"


def ranks() -> int:
    """How many processes torchrun has started together; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def start(device: str) -> World:
    """Join the world that torchrun has set up in the environment; without one, a world of this process alone."""
    size = ranks()
    if size == 1:
        return World(0, 0, 1, pick_device(device))
    local_rank = int(os.environ["LOCAL_RANK"])
    chosen = pick_device(device)
    if chosen.type == "mps":
        raise WorldError(f"run.device: {size} ranks need cpu or cuda, got mps")
    if chosen.type == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise WorldError(f"torchrun: expected at most a rank for each of {torch.cuda.device_count()} GPUs")
        chosen = torch.device("cuda", local_rank)
        torch.cuda.set_device(chosen)
    # Flags travel as CPU tensors over gloo, so that no step waits for the device.
    dist.init_process_group("cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo", timeout=PATIENCE)
    return World(dist.get_rank(), local_rank, size, chosen)


def stop(world: World) -> None:
    """Leave the world, after the last reference to a wrapped module is gone.

    One that outlives its process group waits for the group's threads while it holds the lock that they need.
    """
    if world.size > 1:
        gc.collect()
        dist.destroy_process_group()


def wrap(objective: nn.Module, world: World, parallel: str) -> nn.Module:
    """The module that is minimised, so wrapped that gradients are averaged over the ranks.

    ddp keeps all weights on each rank; fsdp a share of each, which is gathered block by block when it is needed.
    """
    if world.size == 1:
        return objective
    if parallel == "fsdp":
        mesh = init_device_mesh(world.device.type, (world.size,))
        for block in objective.model.model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(objective.model, mesh=mesh)  # evaluation and samples call it without the objective
        return fully_shard(objective, mesh=mesh)
    devices = [world.device] if world.device.type == "cuda" else None
    return DistributedDataParallel(objective, device_ids=devices)


def unwrapped(module: nn.Module) -> nn.Module:
    """The inverse of `wrap`: fsdp changes a module in its place."""
    return module.module if isinstance(module, DistributedDataParallel) else module


@contextmanager
def sync_gradients(module: nn.Module, now: bool) -> Iterator[None]:
    """Average gradients over the ranks only in the backward of a step's last micro-batch."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(now)
    silent = isinstance(module, DistributedDataParallel) and not now
    with module.no_sync() if silent else nullcontext():
        yield


def whole(tensor: Tensor) -> Tensor:
    """A tensor that is spread over the ranks, gathered on all of them; any other as it is. All ranks call it."""
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor


def spread_like(tensor: Tensor, example: Tensor) -> Tensor:
    """The inverse of `whole`: this rank's share of a tensor that every rank has, on the example's device."""
    tensor = tensor.to(example.device)
    return (
        distribute_tensor(tensor, example.device_mesh, example.placements) if isinstance(example, DTensor) else tensor
    )


def total(value: Tensor, world: World) -> Tensor:
    """The sum over all ranks."""
    if world.size > 1:
        dist.all_reduce(value)
    return value


def any_rank(flag: bool, world: World) -> bool:
    """Whether the flag is set on any rank; all ranks get the same answer at the same step."""
    if world.size == 1:
        return flag
    return bool(total(torch.tensor([float(flag)]), world) > 0)


def least(value: int, world: World) -> int:
    """The smallest of the ranks' values."""
    if world.size > 1:
        dist.all_reduce(tensor := torch.tensor([value]), dist.ReduceOp.MIN)
        value = int(tensor)
    return value


def barrier(world: World) -> None:
    if world.size > 1:
        total(torch.zeros(1), world)  # over gloo; nccl's would choose a device by itself
