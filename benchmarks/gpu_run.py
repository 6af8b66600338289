"""Ten minutes of a GPU: does everything work, what does a step take, and which settings pay?

    python -m fastddpm.benchmarks.gpu_run --outdir gpu-run
    python -m fastddpm.benchmarks.gpu_run --device cpu --smoke          the same parts, tiny, without a GPU

Each part is a command with a time limit of its own, the most telling first; a part that fails leaves the others alone.
While the checks run, the networks that later parts time are compiled side by side, so that torch's cache has their
kernels. OUTDIR gets what each part printed, and the bench.json of those that measure.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from fastddpm.benchmarks.harness.case import find

_TESTS = Path(__file__).parents[1] / "tests"
_BUILD = "import sys; from fastddpm.benchmarks.gpu_run import build; build(*sys.argv[1:])"
# What of a part's output the summary repeats.
_LINES = 40


class Part(NamedTuple):
    """A command; the seconds that it should take on a GPU with 16 cores, an estimate; and the most that it may."""

    name: str
    expected: int
    limit: int
    command: Sequence[str]
    timed: bool = False


def parts(device: str, outdir: Path, *, smoke: bool) -> list[Part]:
    """All parts, in order."""
    python = (sys.executable, "-m")

    def bench(name: str, *options: str) -> tuple[str, ...]:
        size = ("--smoke",) if smoke else ()
        return (*python, "fastddpm", "bench", *options, *size, "--device", device, "--outdir", str(outdir / name))

    tests = (*python, "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", str(_TESTS))
    return [
        Part("verify", 75, 150, (*python, "fastddpm", "verify", "--device", device)),
        *([Part("tests", 60, 120, tests)] if _TESTS.is_dir() else []),
        Part("quick", 150, 300, bench("quick", *([] if smoke else ["--quick"]), "sampling", "p_sample"), timed=True),
        Part("counts", 60, 120, bench("counts", "counts", "--no-offline"), timed=True),
        Part("settings", 120, 200, bench("settings", "settings"), timed=True),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts, print how each ended and the end of what it printed; 1 if one did not pass."""
    parser = argparse.ArgumentParser(prog="python -m fastddpm.benchmarks.gpu_run", description=__doc__)
    parser.add_argument("--outdir", type=Path, default=Path("gpu-run"))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: do the parts run?")
    parser.add_argument("--budget", type=float, default=570, help="seconds for everything (default: 570)")
    parser.add_argument("--part", action="append", help="only this part; may be given several times")
    args = parser.parse_args(argv)
    args.outdir.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + args.budget
    chosen = [p for p in parts(args.device, args.outdir, smoke=args.smoke) if not args.part or p.name in args.part]
    ended = {}
    with contextlib.ExitStack() as ahead:
        commands = builds() if not args.smoke and any(part.timed for part in chosen) else ()
        compiling = [ahead.enter_context(_process(command)) for command in commands]
        for part in chosen:
            if part.timed:
                deadline = min(end, time.monotonic() + 120)
                for process in compiling:
                    _wait(process, deadline)
                # Nothing else may run while times are taken.
                ahead.close()
            ended[part.name] = run(part, args.outdir, end)
            print(f"{part.name}: {ended[part.name]}", flush=True)
    for name, how in ended.items():
        lines = (args.outdir / f"{name}.txt").read_text(errors="replace").splitlines()
        print(f"\n== {name}: {how}", *lines[-_LINES:], sep="\n")
    return int(any(not how.startswith("passed") for how in ended.values()))


def run(part: Part, outdir: Path, end: float) -> str:
    """Run a part until it ends, its limit or the end of the whole; return how it ended."""
    start = time.monotonic()
    path = outdir / f"{part.name}.txt"
    if start >= end:
        path.write_text("")
        return "left out, no time was left"
    with path.open("w") as output, _process(part.command, output.fileno()) as process:
        code = _wait(process, min(end, start + part.limit))
    seconds = f"{time.monotonic() - start:.0f} s, {part.expected} s were expected"
    if code is None:
        return f"stopped after {seconds}"
    return f"passed in {seconds}" if code == 0 else f"failed with exit code {code} in {seconds}"


def builds() -> Iterator[Sequence[str]]:
    """The commands that compile the networks of the timed parts, one each."""
    for name, provider, batches in (
        *(("settings", f"fastddpm{setting}", (1, 16, 256)) for setting in ("", ", fused norms", ", sub-pixels")),
        ("sampling", "diffusers, reduce-overhead, bf16", (1, 16)),
    ):
        for case in find(name).cases("cuda", False):
            if (case.network, case.sampler) == ("cifar10", "ddpm") and case.batch in batches:
                yield (sys.executable, "-c", _BUILD, name, case.id, provider)


def build(name: str, case_id: str, provider: str) -> None:
    """Build a provider for a case and call it once."""
    benchmark = find(name)
    (case,) = (case for case in benchmark.cases("cuda", False) if case.id == case_id)
    benchmark.provider(provider).build(case).run()


@contextlib.contextmanager
def _process(command: Sequence[str], output: int = subprocess.DEVNULL) -> Iterator[subprocess.Popen[bytes]]:
    """Start a process; end it, and those that it started, on the way out."""
    with subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True) as process:
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def _wait(process: subprocess.Popen[bytes], end: float) -> int | None:
    """The exit code; None if the process still runs at the end."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        return process.wait(max(0.0, end - time.monotonic()))
    return None


if __name__ == "__main__":
    sys.exit(main())
