"""What a network frees in one call is there for the next."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, torch
from fastddpm import Sampler, Schedule, ddpm_table

faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
model = lambda x, t: x.repeat(1, 256, 1, 1)[:, :3] * 0.5
sampler = Sampler(model, ddpm_table(Schedule.linear(50), steps=20), (3, 64, 64), compile=False)
sampler.sample(seeds=0)
before = faults()
sampler.sample(seeds=0)
print(faults() - before)  # some 12,000 where each step maps 12 MiB anew
"""


def test_pages_are_not_cleared_anew_in_every_call() -> None:
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("how other allocators keep memory is their own choice")
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 2000, run.stderr
