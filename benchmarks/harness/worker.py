"""One provider's own process: ``python -m fastddpm.benchmarks.harness.worker``, driven by `process.ProcessRunner`.

Commands arrive on stdin and answers leave on stdout, one JSON object a line. What libraries print goes to stderr.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO


class Worker:
    """Holds the provider between commands; each public method is a command."""

    def __init__(self) -> None:
        self._work: Any = None
        self._clock: Any = None
        self._base_mb: float | None = None
        self._peak_is_reset = False

    def build(self, subject: str, provider: str, case: dict[str, Any], threads: int) -> dict[str, Any]:
        """Make the provider ready and call it once."""
        import torch
        from fastddpm.benchmarks.harness import memory, subjects
        from fastddpm.benchmarks.harness.case import Case
        from fastddpm.benchmarks.peers.compiled import load_compiler

        torch.set_num_threads(threads)
        chosen = subjects.find(subject).provider(provider)
        self._case = Case.from_dict(case)
        # Memory is what a provider takes beyond its libraries. The compiler's come with a custom operator, diffusers or
        # the first thing compiled, so that they are loaded here: in part for everybody, all of them for who compiles.
        for module in ("torch._inductor.compile_fx", *chosen.needs):
            __import__(module)
        if chosen.compiled:
            load_compiler()
        self._base_mb = memory.resident_mb()
        start = time.perf_counter()
        self._work = chosen.build(self._case)
        built = time.perf_counter()
        self._work.run()
        self._synchronize()
        return {"setup_s": built - start, "first_call_s": time.perf_counter() - built}

    def evaluate(self, path: str) -> dict[str, Any]:
        """Write what the gate wants to a file of tensors."""
        import torch
        from fastddpm.benchmarks.harness.runner import evaluate

        torch.save(evaluate(self._work), path)
        return {}

    def warm(self) -> dict[str, Any]:
        """Make the stopwatch ready; memory is counted from here."""
        from fastddpm.benchmarks.harness import memory
        from fastddpm.benchmarks.harness.clock import make_clock

        self._clock = make_clock(self._work.run, self._case.device, small=not self._case.network)
        self._peak_is_reset = memory.reset_peak()
        if self._case.device == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats()
        return {"how": self._clock.how}

    def time(self) -> dict[str, Any]:
        """Measure once."""
        return {"seconds": self._clock.time()}

    def memory(self) -> dict[str, Any]:
        """Peak memory since `warm`, less what Python and its libraries took before the provider was built.

        None where the system cannot count from `warm`: the compilation's memory would be in it.
        """
        from fastddpm.benchmarks.harness import memory

        if self._case.device == "cuda":
            import torch

            return {"peak_mb": torch.cuda.max_memory_allocated() / 1e6}
        peak = memory.peak_mb()
        if not self._peak_is_reset or peak is None or self._base_mb is None:
            return {"peak_mb": None}
        return {"peak_mb": peak - self._base_mb}

    def _synchronize(self) -> None:
        if self._case.device == "cuda":
            import torch

            torch.cuda.synchronize()


def serve(commands: TextIO, answers: TextIO) -> None:
    """Answer commands until the other side hangs up."""
    worker = Worker()
    for line in commands:
        request = json.loads(line)
        command: Callable[..., dict[str, Any]] = getattr(worker, request.pop("command"))
        try:
            answer = command(**request)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def main() -> None:
    """Keep stdout for answers: whatever else writes to it goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(sys.stdin, answers)


if __name__ == "__main__":
    main()
