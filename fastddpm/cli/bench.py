"""``fastddpm bench``: correctness, then time, beside plain PyTorch, torch.compile and the peers that are installed."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import warnings
from pathlib import Path
from typing import Any

from fastddpm.checks import one_of
from fastddpm.cli.parser import add_shared, examples, positive

# No benchmark: what is counted rather than timed.
COUNTS = "counts"
RESULTS = "bench.json"
DESCRIPTION = """Run the benchmark suite and write bench.json, bench.md and plots. Providers take turns in interleaved
rounds; each passes a correctness gate before it is timed. Peers (diffusers, denoising-diffusion-pytorch, openvino) take
part where they are installed. Without a GPU the CPU is measured, and the compiled GPU code is counted."""

EPILOG = """The full suite takes hours on two cores: most of it is diffusers in float32, and compilation. Choose less by
name, --case and --provider; an interrupted run leaves the cases that it finished in bench.json. Run it on a machine
that does nothing else.

""" + examples(
    "fastddpm bench --quick",
    "fastddpm bench sampling --case digits-B16 --provider fastddpm --outdir after",
    "fastddpm bench --compare before/bench.json after/bench.json",
)

# What --quick runs, by device: names, parts of cases, parts of providers. On CUDA four networks are compiled.
QUICK = {
    "cuda": (
        ["sampling", "p_sample"],
        ["cifar10-B1-ddpm", "cifar10-B16", "p_sample-3x32x32-B16"],
        ["reduce-overhead", "fastddpm, bf"],
    ),
    "cpu": (["sampling", "p_sample"], ["cifar10-B1-ddpm", "p_sample-3x32x32-B16"], ["fastddpm"]),
}


SUBJECTS = """sampling, unet, p_sample, q_sample, randn, training_step, drop_in, settings; counts: operations, launches
and instructions (default: all)"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("only", nargs="*", help=SUBJECTS)
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--smoke", action="store_true", help="run everything once, tiny: does it work?")
    quick = "whole loops and one step, ours and diffusers': planned for eight minutes"
    length.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--rounds", type=positive, help="interleaved rounds (default: 7)")
    parser.add_argument("--case", action="append", help="only cases with these parts, such as cifar10-B16")
    parser.add_argument("--provider", action="append", help="only names that contain this, and the baseline")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: CUDA where it is")
    add_shared(parser, "outdir", outdir=Path("bench-results"))
    compare = "print two bench.json side by side; measure nothing"
    parser.add_argument("--compare", type=Path, nargs=2, metavar=("A", "B"), help=compare)
    parser.add_argument("--arch", default="sm_90", help="GPU that the offline part compiles for")
    parser.add_argument("--no-offline", action="store_true", help="leave the offline part out")
    parser.add_argument("--quiet", action="store_true", help="print the report only")


def run(args: argparse.Namespace) -> int:
    """Measure, write, print."""
    from fastddpm.benchmarks.report import markdown as report
    from fastddpm.benchmarks.report import side_by_side
    from fastddpm.files.run_folder import RunFolder

    if args.compare:
        a, b = map(side_by_side.read, args.compare)
        print(side_by_side.render(a, b, (str(args.compare[0]), str(args.compare[1]))), end="")
        return 0
    # What other libraries warn of would stand between the lines of progress; ours goes through the logger.
    with RunFolder(args.outdir, ()).locked(), warnings.catch_warnings(action="ignore"):
        results = measure(args)
        text = report.render(results)
        write(args, results, text)
    print(text, end="")
    wrong = [row for row in results["rows"] if row["note"].startswith("failed")]
    if wrong:
        print(
            f"fastddpm: {len(wrong)} rows failed, the first: {wrong[0]['provider']}: {wrong[0]['note']}",
            file=sys.stderr,
        )
    return 1 if wrong else 0


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Run what was asked for; the results so far are in the output folder after every case."""
    from fastddpm.benchmarks.counts import cuda, offline, step_counts
    from fastddpm.benchmarks.harness import suite
    from fastddpm.benchmarks.harness.case import NAMES
    from fastddpm.benchmarks.harness.compare import MIN_ROUNDS
    from fastddpm.diagnostics.compile_offline import check_arch
    from fastddpm.files.atomic import write_files

    no_gpu = cuda.why_skipped()
    if args.device == "cuda" and no_gpu is not None:
        raise ValueError(f"--device cuda: {no_gpu}; use --device cpu")
    device = "cpu" if args.device == "cpu" or no_gpu is not None else "cuda"
    names, cases, providers = QUICK[device] if args.quick else ([*NAMES, COUNTS], [], [])
    names = [one_of("benchmark", name, (*NAMES, COUNTS)) for name in args.only or names]
    if COUNTS in names and not args.no_offline:
        check_arch(args.arch)
    results = suite.run(
        [name for name in names if name != COUNTS],
        device=device,
        rounds=args.rounds or (1 if args.smoke else MIN_ROUNDS),
        smoke=args.smoke,
        chosen=args.case or cases,
        providers=args.provider or providers,
        progress=_progress(args),
        save=lambda results: write_files({args.outdir / RESULTS: _encode(results)}),
    )
    if COUNTS in names:
        results["step_counts"] = step_counts.measure(smoke=args.smoke)
        results["cuda"] = cuda.measure(smoke=args.smoke) if device == "cuda" else {"skipped": no_gpu or "--device cpu"}
        if not args.no_offline:
            _progress(args)(f"compiling the kernels for {args.arch}")
            results["offline"] = offline.measure(args.arch, smoke=args.smoke)
    return results


def _encode(results: dict[str, Any]) -> bytes:
    return json.dumps(results, indent=1).encode()


def _progress(args: argparse.Namespace) -> Any:
    return (lambda text: None) if args.quiet else (lambda text: print(text, file=sys.stderr, flush=True))


def write(args: argparse.Namespace, results: dict[str, Any], text: str) -> None:
    """Write JSON, Markdown and, where matplotlib is installed, plots."""
    from fastddpm.benchmarks.report import plots
    from fastddpm.files.atomic import write_files

    files = {RESULTS: _encode(results), "bench.md": text.encode()}
    if importlib.util.find_spec("matplotlib") is None:
        _progress(args)("no plots: pip install matplotlib")
    else:
        files |= plots.draw(results)
    write_files({args.outdir / name: content for name, content in files.items()})
    _progress(args)(f"wrote {', '.join(files)} in {args.outdir}")
