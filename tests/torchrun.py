"""torchrun, for tests: a program in several processes that meet on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def torchrun(
    program: Path, *arguments: str, processes: int = 2, restarts: int = 0, limit: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run a program, with one thread each, and return what became of it."""
    options = ["--standalone", f"--nproc-per-node={processes}", f"--max-restarts={restarts}"]
    command = [sys.executable, "-m", "torch.distributed.run", *options, str(program), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=limit, env=environment, check=False)
