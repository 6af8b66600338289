"""``fastddpm profile``: a timeline of a sampling loop, and where its time went."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastddpm.cli.parser import COMPILE, add_machine, examples, positive

if TYPE_CHECKING:
    from fastddpm.diagnostics.profile import Breakdown, Part, RangedSampler

WIDTH = 80
DESCRIPTION = """Run a sampling loop under torch.profiler, write a Chrome trace (open it in chrome://tracing or
ui.perfetto.dev) with the ranges fastddpm::step, fastddpm::unet and fastddpm::p_sample, and print where its time
went."""

EXAMPLES = examples("fastddpm profile", "fastddpm profile --model cifar10 --batch 64 --dtype bfloat16 --trace t.json")


def add_parser(subparsers: Any) -> None:
    """Attach the subcommand."""
    parser = subparsers.add_parser(
        "profile", help="show where a sampling loop's time goes", description=DESCRIPTION, epilog=EXAMPLES
    )
    parser.add_argument("--model", default="digits", help="shipped model, directory, or cifar10 for a random network")
    parser.add_argument("--batch", type=positive, default=16, help="default: 16")
    parser.add_argument("--steps", type=positive, default=10, help="default: 10")
    parser.add_argument("--sampler", default="ddpm", help="ddpm, ddim, ... (default: ddpm)")
    add_machine(parser, "dtype", "device", "compile")
    parser.set_defaults(dtype="float32")
    parser.add_argument(
        "--cuda-graph", action="store_true", help="replay the step as a graph: its timeline, without ranges inside"
    )
    parser.add_argument("--trace", type=Path, default=Path("trace.json"), help="default: trace.json")
    parser.add_argument("--ranges-only", action="store_true", help="for nsys and ncu: NVTX ranges, no torch.profiler")
    parser.add_argument("--json", action="store_true", help="print the breakdown as JSON")


def run(args: argparse.Namespace) -> int:
    """Profile and print."""
    # Without a GPU torch.profiler reports on stderr that it found none; it reads this once.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    from fastddpm.diagnostics import profile as profiling

    if not args.ranges_only:
        args.trace.parent.mkdir(parents=True, exist_ok=True)
    model = _model(args.model)
    profiled = profiling.run_profile(_sampler(args, model), _call(args, model), traced=not args.ranges_only)
    if profiled is None:
        return 0
    profiled.export_chrome_trace(str(args.trace))
    if args.cuda_graph:
        # The parts of a step are inside the graph, so there is no breakdown.
        print(json.dumps(_files(args)) if args.json else f"timeline: {args.trace} (open in ui.perfetto.dev)")
        return 0
    found = profiling.breakdown(profiled)
    if args.json:
        print(json.dumps(to_dict(found, args), indent=1))
    else:
        print(render(found, args, on_cuda=found.total.device_ms > 0))
    return 0


def _model(name: str) -> Any:
    from fastddpm.benchmarks.peers import networks
    from fastddpm.unet.load import load

    return networks.build(name) if name in ("cifar10", "small", "tiny") else load(name)


def _sampler(args: argparse.Namespace, model: Any) -> RangedSampler:
    import torch

    from fastddpm.diagnostics.profile import RangedSampler
    from fastddpm.sampling.network import diffusion_of, shape_of
    from fastddpm.tables.by_name import make_table

    return RangedSampler(
        model,
        make_table(args.sampler, diffusion_of(model), steps=args.steps),
        shape_of(model),
        device=args.device,
        dtype=getattr(torch, args.dtype),
        compile=COMPILE[args.compile],
        cuda_graph=args.cuda_graph,
        samples_ahead=args.batch,
    )


def _call(args: argparse.Namespace, model: Any) -> dict[str, Any]:
    import torch

    from fastddpm.sampling.conditions import labels_for
    from fastddpm.sampling.network import shape_of

    seeds, (channels, *size) = list(range(args.batch)), shape_of(model)
    beside = model.config.in_channels - channels
    kwargs = {"condition": torch.zeros(args.batch, beside, *size)} if beside else {}
    return {"seeds": seeds, "class_labels": labels_for(model, seeds, None), "model_kwargs": kwargs}


def to_dict(found: Breakdown, args: argparse.Namespace) -> dict[str, Any]:
    """Plain types, for JSON."""
    import dataclasses

    return {**dataclasses.asdict(found), **_files(args)}


def _files(args: argparse.Namespace) -> dict[str, Any]:
    from fastddpm.diagnostics import profile as profiling

    return {"trace": str(args.trace), "commands": profiling.nsight_commands(command(args))}


def command(args: argparse.Namespace) -> str:
    """Return the command line that repeats this run."""
    from fastddpm.diagnostics import environment

    parts = [environment.executable(), "-m", "fastddpm", "profile", "--model", args.model]
    parts += ["--batch", str(args.batch), "--steps", str(args.steps), "--dtype", args.dtype, "--sampler", args.sampler]
    parts += ["--device", args.device, "--compile", args.compile, *(["--cuda-graph"] if args.cuda_graph else [])]
    return shlex.join(parts)


def render(found: Breakdown, args: argparse.Namespace, *, on_cuda: bool) -> str:
    """The breakdown, the longest operations, and what to run for more."""
    from fastddpm.diagnostics import profile as profiling

    where = "device" if on_cuda else "host"
    lines = [
        f"{args.model}, batch {args.batch}, {found.steps} steps, {args.dtype}; with the profiler's own cost",
        "",
        _line("", "calls", "host ms", "device ms" if on_cuda else "", f"% of {where}"),
    ]
    parts = (found.unet, found.p_sample, found.rest, found.gaps, found.total)
    lines += [_part(part, found.total, on_cuda) for part in parts]
    lines += ["", "longest operations, their own time"]
    lines += [_part(part, found.total, on_cuda) for part in found.operations]
    lines += ["", f"timeline: {args.trace} (open in ui.perfetto.dev)"]
    lines += ["On an NVIDIA GPU, for the timeline of the GPU and the counters of our kernels:"]
    lines += _commands(profiling.nsight_commands(command(args)))
    return "\n".join(lines)


def _part(part: Part, total: Part, on_cuda: bool) -> str:
    share = part.device_ms / total.device_ms if on_cuda else part.host_ms / total.host_ms
    device = f"{part.device_ms:.2f}" if on_cuda else ""
    return _line(part.name, str(part.calls), f"{part.host_ms:.2f}", device, f"{100 * share:.1f}")


def _line(name: str, calls: str, host: str, device: str, share: str) -> str:
    short = name if len(name) <= 38 else name[:35] + "..."
    return f"{short:<38}{calls:>8}{host:>11}{device:>11}{share:>12}".rstrip()


def _commands(commands: Mapping[str, str]) -> list[str]:
    """Wrapped with backslashes, so that they can be pasted."""
    lines: list[str] = []
    for text in commands.values():
        wrapped = textwrap.wrap(text, WIDTH - 6, break_long_words=False, break_on_hyphens=False)
        lines += [f"  {line} \\" for line in wrapped[:-1]] + [f"  {wrapped[-1]}"]
    return lines
