"""What runs in one provider's own process, and the memory that the provider takes there."""

from __future__ import annotations

import contextlib
import importlib
import pickle
import signal
import sys
import warnings
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from fastddpm.benchmarks.harness.case import Case, Provider, find
from fastddpm.benchmarks.harness.runner import LocalRunner
from fastddpm.benchmarks.peers.networks import load_compiler

_MB = 1e6


def serve(connection: Connection, benchmark: str, provider: str, case: Case, threads: int) -> None:
    """Build a provider, then call the methods of its runner that the parent names, until it closes the connection."""
    # The parent ends this process, and only the report goes to stdout. Our own warnings are logged.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.stdout = sys.stderr
    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    runner: MeasuredRunner | None = None
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            command = connection.recv()
            answer: Any = None
            failure: str | None = None
            try:
                if runner is None:
                    runner = MeasuredRunner(find(benchmark).provider(provider), case)
                    answer = runner.setup_s, runner.first_call_s
                else:
                    answer = getattr(runner, command)()
            except Exception as error:
                failure = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            # `send` would put tensors into shared memory, of which containers have little.
            connection.send_bytes(pickle.dumps((answer, failure)))


class MeasuredRunner(LocalRunner):
    """A runner with a process to itself, which can measure the memory that its provider takes."""

    def __init__(self, provider: Provider, case: Case) -> None:
        # Memory is what a provider takes beyond its libraries. The compiler's come with a custom operator, diffusers or
        # the first thing compiled, so they are loaded here: in part for every provider, all of them for one that
        # compiles on the CPU. On CUDA the device's memory counts, and nothing needs a C++ compiler.
        for module in ("torch._inductor.compile_fx", *provider.needs):
            importlib.import_module(module)
        if provider.compiled and case.device == "cpu":
            load_compiler()
        self._base_mb = memory_mb("VmRSS")
        super().__init__(provider, case)

    def warm(self) -> str:
        """Make the stopwatch ready; memory counts from here."""
        how = super().warm()
        if self.case.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        self._peak_is_reset = reset_peak()
        return how

    def peak_memory_mb(self) -> float | None:
        """Peak memory since `warm`, in MB.

        On CUDA what the allocator holds: a graph's buffers lie in a private pool, where they do not count as allocated.
        On the CPU what the process holds beyond Python and its libraries; None where the system cannot count from
        `warm`, because the compilation's memory would be in it.
        """
        if self.case.device == "cuda":
            return torch.cuda.max_memory_reserved() / _MB
        peak = memory_mb("VmHWM")
        if not self._peak_is_reset or peak is None or self._base_mb is None:
            return None
        return peak - self._base_mb


def reset_peak() -> bool:
    """Start counting the peak anew; False where the system cannot."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def memory_mb(field: str) -> float | None:
    """Resident memory in MB, "VmRSS" now and "VmHWM" the most since `reset_peak`; None where it is not counted."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    kib = next((line.split()[1] for line in lines if line.startswith(f"{field}:")), None)
    return None if kib is None else int(kib) * 1024 / _MB
