"""Processes that torchrun started: what they are told by its variables, and what they share."""

from __future__ import annotations

import itertools
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from fastddpm.machine import ranks
from fastddpm.machine.ranks import Ranks, join_ranks, rank_and_world

TORCHRUN = {"WORLD_SIZE": "4", "RANK": "3", "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}


def test_rank_and_world_reads_torchruns_variables() -> None:
    assert rank_and_world({}) == (0, 1)
    assert rank_and_world({"WORLD_SIZE": "1"}) == (0, 1)
    assert rank_and_world(TORCHRUN) == (3, 4)
    with pytest.raises(ValueError, match="RANK is not set"):
        rank_and_world({"WORLD_SIZE": "4"})
    with pytest.raises(ValueError, match="RANK must be below"):
        rank_and_world({**TORCHRUN, "RANK": "4"})
    with pytest.raises(ValueError, match="RANK is '-1' and no number"):
        rank_and_world({**TORCHRUN, "RANK": "-1"})
    with pytest.raises(ValueError, match="torchrun did not set it"):
        rank_and_world({"WORLD_SIZE": "4", "RANK": "3"})


def test_ranks_of_one_start_share_counters_and_values(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=10))
    variables = {**TORCHRUN, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.port)}

    def joined(rank: int, run: int = 0, **changed: str) -> Ranks:
        monkeypatch.setattr(ranks, "_joined", itertools.count(run))
        for name, value in {**variables, "RANK": str(rank), **changed}.items():
            monkeypatch.setenv(name, value)
        return join_ranks({"outdir": Path("a"), "steps": 10} | settings)

    settings: dict[str, Any] = {}
    first, second = joined(0), joined(1)
    assert [first.add("taken"), second.add("taken"), second.add("steps", 5), first.add("taken")] == [1, 2, 5, 3]
    first.tell("run", {"seeds": [1, 2]})
    assert second.told("run") == {"seeds": [1, 2]}
    assert second.within("b").add("taken") == 1
    # torchrun's agent keeps the store when it starts the processes again.
    assert joined(0, TORCHELASTIC_RESTART_COUNT="1").add("taken") == 1
    # Nor does a process's second run see the first one's.
    assert joined(0, 1).add("taken") == 1
    settings = {"outdir": Path("b")}
    with pytest.raises(ValueError, match="rank 1 does not do what rank 0 does: outdir was 'a' and is 'b'"):
        joined(1)
    with pytest.raises(ValueError, match="rank 1 does not do what rank 0 does: steps was 10 and is 20"):
        second.refuse_unless_same({"steps": 10}, {"steps": 20})
    # Nobody comes: that is said, and has an end.
    monkeypatch.setattr(ranks, "_SAY_AFTER", 0.0)
    monkeypatch.setattr(ranks, "_GIVE_UP_AFTER", 0.1)
    with pytest.raises(TimeoutError, match=r"rank 1 waited 0 s for rank 0"):
        second.told("never")
    assert caplog.messages == ["waiting for rank 0"]
    with pytest.raises(TimeoutError, match=r"rank 0 waited 0 s for all 4 processes"), first.connected():
        pass


def test_a_process_alone_counts_alone() -> None:
    alone = Ranks()
    assert [alone.add("taken"), alone.add("taken"), alone.within("b").add("taken")] == [1, 2, 1]
    assert Ranks().add("taken") == 1
