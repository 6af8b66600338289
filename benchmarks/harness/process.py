"""A provider in a process of its own, so that no two share an allocator, a thread pool or a cache of kernels."""

from __future__ import annotations

import contextlib
import multiprocessing
import pickle
from typing import Any

import torch
from fastddpm.benchmarks.harness.case import Case, Provider
from fastddpm.benchmarks.harness.worker import serve
from torch import Tensor


class WorkerError(RuntimeError):
    """The provider's process reported an error, or died."""


class ProcessRunner:
    """Starts a process, builds the provider in it, and times it on request.

    Attributes as in `runner.LocalRunner`.

    Raises:
        WorkerError: the provider cannot be built, or its process died.
    """

    def __init__(self, benchmark: str, provider: Provider, case: Case) -> None:
        self.name, self.provider, self.case = provider.name, provider, case
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=serve, args=(theirs, benchmark, provider.name, case, torch.get_num_threads())
        )
        self._process.start()
        theirs.close()
        try:
            self.setup_s, self.first_call_s = self._ask("build")
        except BaseException:
            self.close()
            raise

    def evaluate(self) -> dict[str, Tensor]:
        """Return what the gate needs."""
        return self._ask("evaluate")

    def warm(self) -> str:
        """Make the stopwatch ready; return what it measures."""
        return self._ask("warm")

    def time(self) -> float:
        """Seconds per call.

        Raises:
            WorkerError: the process died, or its call raised.
        """
        try:
            return self._ask("time")
        except WorkerError as error:
            raise WorkerError(f"{self.name}: {error}") from error

    def peak_memory_mb(self) -> float | None:
        """Peak memory since `warm`, without Python and its libraries; None where the system does not count it."""
        return self._ask("peak_memory_mb")

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        self._process.join(timeout=10)
        self._process.kill()
        self._process.join()

    def _ask(self, command: str) -> Any:
        try:
            with contextlib.suppress(BrokenPipeError):
                self._connection.send(command)
            answer, error = pickle.loads(self._connection.recv_bytes())
        except (EOFError, ConnectionError):
            self._process.join()
            raise WorkerError(f"its process died during {command!r}, exit code {self._process.exitcode}") from None
        if error is not None:
            raise WorkerError(error)
        return answer
