"""A provider in a process of its own, so that nobody shares an allocator, a thread pool or a cache of kernels."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from fastddpm.benchmarks.harness.case import Case, Check, Provider, Subject
from fastddpm.benchmarks.harness.runner import GateError

_MODULE = "fastddpm.benchmarks.harness.worker"


class WorkerError(RuntimeError):
    """The provider's process reported an error, or died."""


class ProcessRunner:
    """Starts a process, builds the provider in it, and times it on request.

    Attributes as in `runner.LocalRunner`.

    Raises:
        WorkerError: the provider cannot be built, or its process died.
    """

    def __init__(self, subject: str, provider: Provider, case: Case) -> None:
        self.name, self.provider, self.case = provider.name, provider, case
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115  # closed by close()
        self._process = subprocess.Popen(
            [sys.executable, "-m", _MODULE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        try:
            built = self._ask(
                "build",
                subject=subject,
                provider=provider.name,
                case=case.to_dict(),
                threads=torch.get_num_threads(),
            )
        except BaseException:
            self.close()
            raise
        self.setup_s: float = built["setup_s"]
        self.first_call_s: float = built["first_call_s"]

    def gate(self, subject: Subject) -> Check:
        """Judge here what the process computed there.

        Raises:
            GateError: it is wrong.
        """
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "found.pt"
            self._ask("evaluate", path=str(path))
            found = torch.load(path, weights_only=True)
        check = subject.check(self.case, self.provider, found)
        if not check.ok:
            raise GateError(check)
        return check

    def warm(self) -> str:
        """Make the stopwatch ready, and say what it measures."""
        return self._ask("warm")["how"]

    def time(self) -> float:
        """Seconds per call.

        Raises:
            WorkerError: the process died, or its work raised.
        """
        try:
            return self._ask("time")["seconds"]
        except WorkerError as error:
            raise WorkerError(f"{self.name}: {error}") from error

    def peak_memory_mb(self) -> float | None:
        """Peak memory over the rounds, without Python and its libraries; None where the system does not say."""
        return self._ask("memory")["peak_mb"]

    def close(self) -> None:
        """End the process."""
        process = self._process
        with contextlib.suppress(OSError):
            process.stdin.close()  # type: ignore[union-attr]
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()  # type: ignore[union-attr]
        self._stderr.close()

    def _ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        line = ""
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps({"command": command, **arguments}) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        if not line:
            raise WorkerError(f"its process died during {command!r}: {self._last_words()}")
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer

    def _last_words(self) -> str:
        self._process.wait()
        self._stderr.seek(0)
        lines = self._stderr.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"exit status {self._process.returncode}"
