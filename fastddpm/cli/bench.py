"""``fastddpm bench``: correctness, then time, beside plain PyTorch, torch.compile and the peers that are installed."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

# No benchmark: what is counted rather than timed.
COUNTS = "counts"
RESULTS = "bench.json"
DESCRIPTION = """Run the benchmark suite and write bench.json, bench.md and plots. Providers take turns in interleaved
rounds; each passes a correctness gate before it is timed. Peers (diffusers, denoising-diffusion-pytorch, openvino) take
part where they are installed. Without a GPU the CPU is measured, and the compiled GPU code is counted."""

EPILOG = """The full suite takes hours on two cores: most of it is diffusers in float32, and compilation. Choose less by
name, --case and --provider, and join the runs' bench.json with --from-json; an interrupted run leaves the cases that
it finished there. Run it on a machine that does nothing else."""


def add_parser(subparsers: Any) -> None:
    """Attach the subcommand."""
    parser = subparsers.add_parser(
        "bench", help="measure against the alternatives", description=DESCRIPTION, epilog=EPILOG
    )
    parser.add_argument(
        "only",
        nargs="*",
        help="sampling, unet, p_sample, q_sample, randn, training_step, drop_in; counts: operations, launches and "
        "instructions (default: all)",
    )
    parser.add_argument("--smoke", action="store_true", help="run everything once, tiny: does it work?")
    parser.add_argument("--rounds", type=_positive, help="interleaved rounds (default: 7)")
    parser.add_argument("--case", action="append", default=[], help="only cases with these parts, such as cifar10-B16")
    parser.add_argument(
        "--provider", action="append", default=[], help="only names that contain this, and the baseline"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: CUDA where it is")
    parser.add_argument("--outdir", type=Path, default=Path("bench-results"), help="default: bench-results")
    parser.add_argument("--readme", type=Path, help="also write the numbers between the markers of this file")
    parser.add_argument(
        "--from-json", type=Path, nargs="+", help="write one report of earlier runs' bench.json; measure nothing"
    )
    parser.add_argument("--arch", default="sm_90", help="GPU that the offline part compiles for (default: sm_90)")
    parser.add_argument("--no-offline", action="store_true", help="leave the offline part out")
    parser.add_argument("--quiet", action="store_true", help="print the report only")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def run(args: argparse.Namespace) -> int:
    """Measure, write, print."""
    from fastddpm.benchmarks.report import markdown as report
    from fastddpm.benchmarks.report import merge, readme

    if args.from_json:
        results = merge.merge([json.loads(path.read_text()) for path in args.from_json])
    else:
        results = measure(args)
    text = report.render(results)
    write(args, results, text)
    if args.readme is not None:
        readme.update(args.readme, results)
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
    from fastddpm.benchmarks.harness.case import NAMES, find
    from fastddpm.benchmarks.harness.compare import MIN_ROUNDS
    from fastddpm.diagnostics.compile_offline import check_arch
    from fastddpm.files.atomic import write_files

    only = args.only or (*NAMES, COUNTS)
    names = [name for name in only if name != COUNTS]
    for name in names:
        find(name)
    no_gpu = cuda.why_skipped()
    if args.device == "cuda" and no_gpu is not None:
        raise ValueError(f"--device cuda: {no_gpu}; use --device cpu")
    if COUNTS in only and not args.no_offline:
        check_arch(args.arch)
    device = "cpu" if args.device == "cpu" or no_gpu is not None else "cuda"
    results = suite.run(
        names,
        device=device,
        rounds=args.rounds or (1 if args.smoke else MIN_ROUNDS),
        smoke=args.smoke,
        chosen=args.case,
        providers=args.provider,
        progress=_progress(args),
        save=lambda results: write_files({args.outdir / RESULTS: _encode(results)}),
    )
    if COUNTS in only:
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

    write_files({args.outdir / RESULTS: _encode(results), args.outdir / "bench.md": text.encode()})
    if importlib.util.find_spec("matplotlib") is None:
        _progress(args)("no plots: pip install matplotlib")
        return
    for path in plots.draw(results, args.outdir):
        _progress(args)(f"wrote {path}")
