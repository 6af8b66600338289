"""The processes that torchrun started: which of them this one is, and the store that they share."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastddpm.files.run_folder import differences
from fastddpm.machine.devices import resolve_device

logger = logging.getLogger("fastddpm")

# Seconds between two looks at the store (a wait inside the store would hear no signal), until a wait is spoken of, and
# until it ends, which is Gloo's own limit.
_LOOK_EVERY, _SAY_AFTER, _GIVE_UP_AFTER = 0.02, 2.0, 1800.0
_CONNECT_IN = timedelta(seconds=30)

_joined = itertools.count()


@dataclass(frozen=True)
class Ranks:
    """This process among all of its run; alone by default.

    Attributes:
        rank: 0 to world - 1.
        world: the number of processes.
        store: what they share, torch.distributed's; None for a process alone.
    """

    rank: int = 0
    world: int = 1
    store: Any = None
    _counts: collections.Counter[str] = field(default_factory=collections.Counter)

    def add(self, name: str, n: int = 1) -> int:
        """Add to a counter that all ranks share, and return what it holds then."""
        if self.store is None:
            self._counts[name] += n
            return self._counts[name]
        return int(self.store.add(name, n))

    def tell(self, name: str, value: Any) -> None:
        """Let the other ranks have a value of JSON types."""
        if self.store is not None:
            self.store.set(name, _to_json(value))

    def told(self, name: str) -> Any:
        """Return a value that rank 0 tells, waiting for it.

        Raises:
            TimeoutError: it did not come in half an hour.
        """
        self._wait("rank 0", lambda: self.store.check([name]))
        return json.loads(self.store.get(name))

    def _wait(self, whom: str, arrived: Callable[[], bool]) -> None:
        started, said = time.monotonic(), False
        while not arrived():
            waited = time.monotonic() - started
            if waited > _GIVE_UP_AFTER:
                raise TimeoutError(f"rank {self.rank} waited {waited:.0f} s for {whom} and gave up")
            # Two of them say it for all.
            if waited > _SAY_AFTER and not said and self.rank < 2:
                logger.warning("waiting for %s", whom)
                said = True
            time.sleep(_LOOK_EVERY)

    @contextlib.contextmanager
    def connected(self) -> Iterator[None]:
        """Be torch.distributed's default process group, Gloo on CPUs and NCCL on CUDA; one process needs none."""
        if self.store is None:
            yield
            return
        # Here, since a wait inside torch.distributed would hear no signal.
        self.add("connecting")
        self._wait(f"all {self.world} processes", lambda: self.add("connecting", 0) >= self.world)
        dist.init_process_group(store=self.store, rank=self.rank, world_size=self.world)
        try:
            yield
        except RuntimeError as error:
            if re.search("/gloo/.*Connection (closed|reset)", str(error)):
                raise ConnectionError("the connection to another process ended: it failed, or was killed") from None
            raise
        # Not after an error: this would wait for ranks that wait for this one, and torchrun ends them when it is gone.
        dist.destroy_process_group()

    def reduced(self, value: float, *, largest: bool = False) -> float:
        """Return the sum, or the largest, of what all connected ranks give."""
        total = torch.tensor(value, dtype=torch.float64, device="cpu")
        if self.store is not None:
            dist.all_reduce(total, dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM)
        return total.item()

    def wait_for_all(self) -> None:
        """Wait until every connected rank has come here."""
        self.reduced(0)

    def each(self, f: Callable[[Tensor], Tensor], blocks: Sequence[Tensor]) -> Tensor:
        """Return f of every block, end to end; connected ranks compute a share each, and all have the same result."""
        own = [f(block) for block in blocks[self.rank :: self.world]]
        if self.store is not None:
            shares: list[Any] = [None] * self.world
            dist.all_gather_object(shares, own)
            own = [shares[i % self.world][i // self.world] for i in range(len(blocks))]
        return torch.cat(own)

    def within(self, name: str) -> Ranks:
        """Return the same ranks with counters and values of their own."""
        store = None if self.store is None else dist.PrefixStore(name, self.store)
        return dataclasses.replace(self, store=store, _counts=collections.Counter())

    def agree(self, name: str, own: Callable[[], Mapping[str, Any]]) -> None:
        """Refuse what differs from what rank 0 tells, which waits for nobody; others look after it has told.

        Raises:
            ValueError, TimeoutError: see `refuse_unless_same` and `told`.
        """
        if self.rank > 0:
            self.refuse_unless_same(self.told(name), json.loads(_to_json(own())))
        elif self.store is not None:
            self.tell(name, own())

    def refuse_unless_same(self, first: Mapping[str, Any], own: Mapping[str, Any]) -> None:
        """Refuse settings that differ from those of rank 0.

        Raises:
            ValueError: they do; the message names each difference.
        """
        if changed := differences(first, own):
            raise ValueError(f"rank {self.rank} does not do what rank 0 does: {'; '.join(changed)}")


ALONE = Ranks()


def refuse_other_calls(own: Mapping[str, Any], group: dist.ProcessGroup) -> None:
    """Refuse, in every process of a group alike, a call that is not made alike in all of them.

    Raises:
        ValueError: the message names the first rank that differs, and each difference.
    """
    calls: list[Any] = [None] * group.size()
    dist.all_gather_object(calls, own, group)
    for rank, call in enumerate(calls):
        Ranks(rank).refuse_unless_same(calls[0], call)


def _to_json(value: Any) -> str:
    return json.dumps(value, default=str)


def device_of_rank(name: str) -> torch.device:
    """Return a device by its name, where "cuda" is the one of torchrun's LOCAL_RANK; see `resolve_device`."""
    if "LOCAL_RANK" in os.environ and (name == "cuda" or (name == "auto" and torch.cuda.is_available())):
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    return resolve_device(name)


def rank_and_world(environment: Mapping[str, str]) -> tuple[int, int]:
    """Return this process's rank and the number of processes, from torchrun's variables; (0, 1) without them.

    Raises:
        ValueError: the variables contradict each other, or torchrun did not set them.
    """
    world = _number("WORLD_SIZE", environment.get("WORLD_SIZE", "1"))
    if world == 1:
        return 0, 1
    if "RANK" not in environment:
        raise ValueError(f"WORLD_SIZE is {world} and RANK is not set; start with torchrun, or unset WORLD_SIZE")
    rank = _number("RANK", environment["RANK"])
    if rank >= world:
        raise ValueError(f"RANK is {rank} and WORLD_SIZE is {world}; RANK must be below it")
    if environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        raise ValueError(f"WORLD_SIZE is {world} and torchrun did not set it; start with torchrun, or unset WORLD_SIZE")
    return rank, world


def _number(name: str, text: str) -> int:
    if not text.isdecimal():
        raise ValueError(f"{name} is {text!r} and no number; start with torchrun, or unset it")
    return int(text)


def join_ranks(settings: Mapping[str, Any]) -> Ranks:
    """Return this process among those that torchrun started with it, connected to the store of torchrun's agent.

    Args:
        settings: what this process is to do.

    Raises:
        ValueError: torchrun's variables contradict each other, or rank 0 has other settings.
        torch.distributed.DistNetworkError: the store does not answer.
        TimeoutError: rank 0 did not come.
    """
    rank, world = rank_and_world(os.environ)
    if world == 1:
        return Ranks()
    # The agent has its store before it starts a process.
    store, _, _ = next(dist.rendezvous("env://", timeout=_CONNECT_IN))
    # The agent keeps its store when it starts the processes again, and with it the counters of those that died; and a
    # process may come here again, for another run.
    start = f"fastddpm/{os.environ['TORCHELASTIC_RESTART_COUNT']}/{world}/{next(_joined)}"
    ranks = Ranks(rank, world, dist.PrefixStore(start, store))
    ranks.agree("settings", lambda: settings)
    return ranks
