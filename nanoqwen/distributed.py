"""The machine: device, precision, signals, compilation, and the ranks of a torchrun world.

A world of one needs none of torch.distributed. FSDP and its tensors are recognised by their methods, since importing
their classes takes as long as half of torch; `wrap_model` alone imports them.
"""

from __future__ import annotations

import gc
import os
import platform
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from nanoqwen.errors import ConfigError, Preempted, WorldError, say

Result = TypeVar("Result")
WORTH_COMPILING = 1e16  # FLOPs of a run: half a minute of an H100, about what compiling takes
TIMEOUT = timedelta(hours=4)  # that ranks wait for each other: one prepares the data, or writes a large checkpoint


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
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    # With its index, as tensors name it: what compares the two would compile and build tables twice.
    return torch.device("cuda", torch.cuda.current_device()) if name == "cuda" else torch.device(name)


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
        slow = name == "float16" and device.type == "cpu"
        return getattr(torch, name), "as asked; slow: no CPU computes it by itself" if slow else "as asked"
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device) >= (8, 0):
            return torch.bfloat16, "this GPU has bf16 matrix units"
        return torch.float16, "this GPU is older than bf16 matrix units"
    if device.type == "mps":
        return torch.float32, "safe on every Apple GPU"
    # Only AMX makes a bf16 product faster than an fp32 one in torch 2.13: with AVX512-BF16 alone it has half the rate
    # (Xeon, 1024 x 1024: 84 against 153 GFLOP/s), without any such instruction about a fifth.
    if getattr(torch.cpu, "get_capabilities", dict)().get("amx_bf16"):
        return torch.bfloat16, "this CPU has bf16 matrix units (AMX)"
    return torch.float32, "this CPU has no bf16 matrix units"


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
    if chosen.type == "cuda":
        dist.init_process_group("cpu:gloo,cuda:nccl", timeout=TIMEOUT, device_id=chosen)
    else:
        dist.init_process_group("gloo", timeout=TIMEOUT)
    return World(dist.get_rank(), local_rank, size, chosen)


def stop(world: World) -> None:
    """Leave the world, after the last reference to a wrapped module is gone.

    One that outlives its process group waits for the group's threads while it holds the lock that they need.
    """
    if world.size > 1:
        gc.collect()
        dist.destroy_process_group()


# --- compiling and wrapping -------------------------------------------------------------------------------------------


def compile_objective(objective: nn.Module, mode: str, flops: float, seq_len: int, device: torch.device) -> nn.Module:
    """Compile in place: mode off, on, or auto, which compiles on CUDA alone, for a run of enough `flops`.

    Each layer by itself, and the loss of a chunk of logits: one small graph each, which all layers and all chunks
    share. One graph of the whole would unroll them: minutes of compiling, and anew for each number of targets.
    """
    if mode == "off" or (mode == "auto" and (device.type != "cuda" or flops < WORTH_COMPILING)):
        return objective
    try:
        torch.compile(lambda x: x + 1)(torch.ones(8, device=device))
    except Exception as error:  # no compiler, no Triton, a broken one: each fails in its own way
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}" if str(error).strip() else "no reason"
        if mode == "on":
            raise ConfigError(f"compile: expected a working compiler, got {reason:.200}") from None
        say(f"not compiled: no working compiler ({reason:.200})")
        return objective
    model = objective.model  # whose rotary tables are made now: grown later, they would compile everything again
    model.rope.tables(model.cfg, seq_len, device)
    for block in model.model.layers:
        block.compile()
    model.loss_of_chunk = torch.compile(model.loss_of_chunk)
    return objective


def uncompiled() -> Any:
    """A context in which modules run as written: evaluation and samples have shapes of their own, each of which would
    be compiled."""
    compiler_loaded = "torch._dynamo" in sys.modules  # which takes half a second, for a run that compiles nothing
    return torch.compiler.set_stance("force_eager") if compiler_loaded else nullcontext()


def wrap_model(objective: nn.Module, world: World, parallel: str) -> nn.Module:
    """The module that is minimised, wrapped so that gradients are averaged over the ranks.

    ddp keeps all weights on each rank; fsdp a shard of each, which is gathered block by block when it is needed.
    """
    if world.size == 1:
        return objective
    if parallel == "fsdp":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(world.device.type, (world.size,))
        for block in objective.model.model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(objective.model, mesh=mesh)  # evaluation and samples call it without the objective
        fully_shard(objective, mesh=mesh)
        objective._get_fsdp_state()._lazy_init()  # else the model would be the root, if an evaluation calls it first
        return objective
    devices = [world.device] if world.device.type == "cuda" else None
    return DistributedDataParallel(objective, device_ids=devices)


def unwrap_model(module: nn.Module) -> nn.Module:
    """The inverse of `wrap_model`: fsdp changes a module in place."""
    return module.module if isinstance(module, DistributedDataParallel) else module


@contextmanager
def sync_gradients(module: nn.Module, now: bool) -> Iterator[None]:
    """Average gradients over the ranks only in the backward of a step's last micro-batch."""
    if hasattr(module, "set_requires_gradient_sync"):  # FSDP
        module.set_requires_gradient_sync(now)
    skip = isinstance(module, DistributedDataParallel) and not now
    with module.no_sync() if skip else nullcontext():
        yield


# --- collectives: all ranks call them together ------------------------------------------------------------------------


def full_tensor(tensor: Tensor) -> Tensor:
    """A sharded tensor, gathered on all ranks; any other as it is."""
    return tensor.detach().full_tensor() if hasattr(tensor, "full_tensor") else tensor


def shard_like(tensor: Tensor, example: Tensor) -> Tensor:
    """The inverse of `full_tensor`: this rank's shard of a tensor that every rank has, on the example's device."""
    tensor = tensor.to(example.device)
    if not hasattr(example, "full_tensor"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, example.device_mesh, example.placements)


def all_reduce_sum(value: Tensor, world: World) -> Tensor:
    """The sum over all ranks, in place."""
    if world.size > 1:
        dist.all_reduce(value)
    return value


def all_reduce_min(value: int, world: World) -> int:
    """The smallest of the ranks' values."""
    if world.size > 1:
        dist.all_reduce(tensor := torch.tensor([value]), dist.ReduceOp.MIN)
        value = int(tensor)
    return value


def any_rank(flag: bool, world: World) -> bool:
    """True if the flag is set on any rank; all ranks get the same answer at the same step."""
    if world.size == 1:
        return flag
    return bool(all_reduce_sum(torch.tensor([float(flag)]), world) > 0)


def barrier(world: World) -> None:
    if world.size > 1:
        all_reduce_sum(torch.zeros(1), world)  # over gloo; nccl's would choose a device by itself


def main_rank_first(world: World, make: Callable[[], Result]) -> Result:
    """Run `make` on the main rank first; the others then find its files."""
    if not world.is_main:
        barrier(world)
    result = make()
    if world.is_main:
        barrier(world)
    return result


# --- signals ----------------------------------------------------------------------------------------------------------


class Stop:
    """First signal: save and exit after this step. Second Ctrl-C: exit now.

    Before the first step there is nothing to save, and any signal exits at once.
    """

    def __init__(self) -> None:
        self.requested = False
        self.can_wait = False  # set by the loop, which reads the flag

    @contextmanager
    def watching(self) -> Iterator[None]:
        old = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    def _handle(self, number: int, _: Any) -> None:
        if number == signal.SIGINT and (self.requested or not self.can_wait):
            raise KeyboardInterrupt
        if not self.can_wait:
            raise Preempted("stopped by a signal before the first step; the same command starts again")
        self.requested = True
