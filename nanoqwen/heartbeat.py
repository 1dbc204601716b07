"""Ranks that watch each other. One that is stopped, frozen or cut off would let the others wait in their next
collective for hours; with a heartbeat they say which one it is, and leave."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Protocol

import torch.distributed as dist

from nanoqwen.distributed import World
from nanoqwen.errors import SILENT

LONGEST_PAUSE, PAUSES = 5.0, 10  # seconds between two beats; of which a timeout has at least so many
GONE = 1 << 40  # beats of a rank that has left in order


class Store(Protocol):
    """What ranks share: torchrun's."""

    def add(self, key: str, amount: int) -> int: ...


class Silence:
    """How long each of the other ranks has been silent, by this rank's own waking time."""

    def __init__(self, store: Store, rank: int, size: int):
        self.store, self.rank = store, rank
        self.beats = dict.fromkeys((other for other in range(size) if other != rank), 0)
        self.seconds = dict.fromkeys(self.beats, 0.0)
        self.unreachable = 0.0  # seconds for which the store has not answered

    def beat(self, passed: float) -> None:
        """Give a sign of life and look for those of the others, `passed` seconds after the last time."""
        try:
            self.store.add(f"{self.rank}", 1)
            beats = {rank: self.store.add(f"{rank}", 0) for rank in self.beats}
        except (RuntimeError, OSError):  # torch's DistStoreError is a RuntimeError
            self.unreachable += passed
            return
        self.unreachable = 0.0
        for rank, count in beats.items():
            alive = count != self.beats[rank] or count >= GONE
            self.seconds[rank] = 0.0 if alive else self.seconds[rank] + passed
        self.beats = beats

    def leave(self) -> None:
        """Say that no more beats will come."""
        with suppress(RuntimeError, OSError):
            self.store.add(f"{self.rank}", GONE)

    def silent(self, timeout: float) -> str | None:
        """Who has been silent for so long, in words."""
        ranks = [str(rank) for rank, seconds in self.seconds.items() if seconds >= timeout]
        if self.unreachable >= timeout:
            return "the launcher's store"
        return f"rank{'s' * (len(ranks) > 1)} {', '.join(ranks)}" if ranks else None

    def speaks(self, timeout: float) -> bool:
        """Whether this is the first of the ranks that are not silent, which speaks for all."""
        return all(seconds >= timeout for rank, seconds in self.seconds.items() if rank < self.rank)


@contextmanager
def watching(world: World, timeout: float, record: Callable[[str], None]) -> Iterator[None]:
    """Leave the process with `SILENT` once another rank gives no sign of life for `timeout` seconds.

    record: writes the reason down; called by one of the ranks that are left
    """
    if world.size == 1:
        yield
        return
    # A client of its own: the world's waits while the main thread waits in it.
    pause = min(LONGEST_PAUSE, timeout / PAUSES)
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    client = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=max(pause, 1.0)))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    silence, left = Silence(dist.PrefixStore(f"heartbeat/{attempt}", client), world.rank, world.size), threading.Event()

    def watch() -> None:
        before = time.monotonic()
        while not left.wait(pause):
            now = time.monotonic()
            silence.beat(min(now - before, 2 * pause))  # a laptop that slept has not heard the others either
            before = now
            if who := silence.silent(timeout):
                reason = f"{who} gave no sign of life for {timeout:g} s (run.timeout); the same command resumes"
                if silence.speaks(timeout):
                    print(f"error: {reason}", file=sys.stderr, flush=True)
                    record(reason)
                os._exit(SILENT)  # the main thread waits for the silent rank, where no exception reaches it

    thread = threading.Thread(target=watch, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        left.set()
        thread.join()
        silence.leave()
