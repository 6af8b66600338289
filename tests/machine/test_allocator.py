"""What a network frees in one call is there for the next, and what nobody needs again is given back."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import resource, torch
from fastddpm import Sampler, Schedule, ddpm_table

faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
model = lambda x, t: (x.repeat(1, 448, 1, 1) * 0.5)[:, :3].clone()
sampler = Sampler(model, ddpm_table(Schedule.linear(50), steps=20), (3, 64, 64), compile=False)
sampler.sample(seeds=0)


def faults_of_a_run():
    before = faults()
    sampler.sample(seeds=0)
    return faults() - before


# Some 100,000 where each step maps two blocks of 21 MiB anew; one of them may come at any time.
print(min(faults_of_a_run() for _ in range(3)))
"""


def test_pages_are_not_cleared_anew_in_every_call() -> None:
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("how other allocators keep memory is their own choice")
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 2000, run.stderr


GIVING_BACK = """
import mmap, sys, torch
from pathlib import Path
from fastddpm.machine.allocator import keep_freed_memory, memory_given_back

resident = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE >> 20
keep_freed_memory()
with open(sys.argv[1], "rb") as file:
    before = resident()
    with memory_given_back():
        content = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
        assert sum(content[:: mmap.PAGESIZE]) == 7 * len(content) // mmap.PAGESIZE
        blocks = [torch.ones(1 << 18) for _ in range(64)]
        above_them = torch.ones(1)
        del blocks
        inside = resident()
    after = resident()
    assert content[-1] == 7
print(inside - before, after - before)
"""


def test_freed_blocks_and_pages_of_files_are_given_back(tmp_path: Path) -> None:
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("madvise and malloc_trim are asked of Linux and glibc")
    file = tmp_path / "file"
    file.write_bytes(b"\7" * (64 << 20))
    run = subprocess.run([sys.executable, "-c", GIVING_BACK, file], capture_output=True, text=True, check=True)
    inside, after = map(int, run.stdout.split())
    assert inside >= 120, run.stdout
    assert after < 16, run.stdout
