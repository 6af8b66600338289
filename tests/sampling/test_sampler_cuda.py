"""Faults of a sampler that only a GPU can show."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch
from torch import Tensor

from fastddpm import Sampler, Schedule, ddpm_table

pytestmark = pytest.mark.gpu

TABLE = ddpm_table(Schedule.linear(50, 1e-3, 0.2), steps=5)
SHAPE = (3, 8, 8)


def halve(x: Tensor, t: Tensor) -> Tensor:
    return x * 0.5


def in_a_new_process(script: str) -> str:
    prelude = """
    import os
    import torch
    from fastddpm import Sampler, Schedule, ddpm_table
    TABLE = ddpm_table(Schedule.linear(50), steps=5)
    """
    code = textwrap.dedent(prelude) + textwrap.dedent(script)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("cuda_graph", [True, False])
def test_out_of_memory_frees_the_pool_and_a_smaller_batch_works(cuda_graph: bool) -> None:
    torch.cuda.empty_cache()
    third = torch.cuda.mem_get_info()[0] // 3

    def greedy(x: Tensor, t: Tensor) -> Tensor:
        torch.empty(len(x) * third, dtype=torch.uint8, device=x.device)
        return x * 0.5

    s = Sampler(greedy, TABLE, SHAPE, device="cuda", compile=False, cuda_graph=cuda_graph)
    expected = Sampler(halve, TABLE, SHAPE, device="cuda", compile=False, cuda_graph=False).sample(seeds=[1])
    with pytest.raises(torch.OutOfMemoryError, match="smaller batch"):
        s.sample(seeds=range(4))
    assert torch.cuda.memory_reserved() < third
    assert torch.equal(s.sample(seeds=[1]), expected)


def test_streams_may_take_turns() -> None:
    s = Sampler(halve, TABLE, SHAPE, device="cuda", compile=False)
    expected = [s.sample(seeds=[seed]) for seed in range(8)]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(2)]
    got = []
    for seed in range(8):
        with torch.cuda.stream(streams[seed % 2]):
            got.append(s.sample(seeds=[seed]))
    torch.cuda.synchronize()
    assert all(map(torch.equal, got, expected))


def test_call_after_an_illegal_access_says_to_start_a_new_process() -> None:
    said = in_a_new_process("""
    def reads_beyond(x, t):
        return x * x.flatten()[torch.full((1,), 1 << 40, device=x.device)]

    s = Sampler(reads_beyond, TABLE, (3, 8, 8), device="cuda", compile=False, cuda_graph=False)
    for _ in range(2):
        try:
            s.sample(seeds=[1])
            torch.cuda.synchronize()
        except RuntimeError as error:
            said = str(error)
    print(said)
    """)
    assert "start a new one" in said


def test_forked_process_says_to_spawn() -> None:
    said = in_a_new_process("""
    torch.zeros(1, device="cuda")
    if os.fork() == 0:
        try:
            Sampler(lambda x, t: x, TABLE, (3, 8, 8), device="cuda")
        except RuntimeError as error:
            print(error, flush=True)
        os._exit(0)
    os.wait()
    """)
    assert "spawn" in said
