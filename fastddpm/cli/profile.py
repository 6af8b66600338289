"""``fastddpm profile``: a timeline of a sampling loop, and where its time went."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastddpm.cli.parser import COMPILE, add_shared, announce, examples, new_file, positive

if TYPE_CHECKING:
    from fastddpm.diagnostics.profile import Breakdown, Part

WIDTH = 80
DESCRIPTION = """Run a sampling loop under torch.profiler, write a Chrome trace (open it in chrome://tracing or
ui.perfetto.dev) with the ranges fastddpm::step, fastddpm::unet and fastddpm::p_sample, and print where its time
went."""

EPILOG = examples("fastddpm profile", "fastddpm profile --model cifar10 --batch 64 --dtype bfloat16 --trace t.json")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("--model", default="digits", help="shipped model, directory, or cifar10 for a random network")
    parser.add_argument("--batch", type=positive, default=16, help="default: 16")
    parser.add_argument("--steps", type=positive, default=10, help="default: 10")
    parser.add_argument("--sampler", default="ddpm", help="ddpm, ddim, ...")
    add_shared(parser, "dtype", "device", "compile", dtype="float32")
    graph = "replay the step as a graph: its timeline, without ranges inside"
    parser.add_argument("--cuda-graph", action="store_true", help=graph)
    parser.add_argument("--trace", type=new_file, default=Path("trace.json"), help="default: trace.json")
    parser.add_argument("--ranges-only", action="store_true", help="for nsys and ncu: NVTX ranges, no torch.profiler")
    parser.add_argument("--json", action="store_true", help="print the breakdown as JSON")


def run(args: argparse.Namespace) -> int:
    """Profile and print."""
    # Without a GPU torch.profiler reports on stderr that it found none; it reads this once.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    import torch

    from fastddpm.benchmarks.peers import networks
    from fastddpm.diagnostics import profile as profiling
    from fastddpm.sampling.conditions import labels_for
    from fastddpm.sampling.network import diffusion_of, shape_of
    from fastddpm.tables.by_name import make_table
    from fastddpm.unet.load import load

    if not args.ranges_only:
        args.trace.parent.mkdir(parents=True, exist_ok=True)
    model = networks.build(args.model) if args.model in ("cifar10", "small", "tiny") else load(args.model)
    sampler = profiling.RangedSampler(
        model,
        make_table(args.sampler, diffusion_of(model), steps=args.steps),
        shape_of(model),
        device=args.device,
        dtype=getattr(torch, args.dtype),
        compile=COMPILE[args.compile],
        cuda_graph=args.cuda_graph,
        samples_ahead=args.batch,
    )
    seeds, (channels, *size) = list(range(args.batch)), sampler.shape
    call: dict[str, Any] = {"seeds": seeds, "class_labels": labels_for(model, seeds, None)}
    if beside := model.config.in_channels - channels:
        call["model_kwargs"] = {"condition": torch.zeros(args.batch, beside, *size)}
    announce(f"profiling {args.steps} steps of {args.model}", quiet=args.json)
    profiled = profiling.run_profile(sampler, call, traced=not args.ranges_only)
    if profiled is None:
        return 0
    profiled.export_chrome_trace(str(args.trace))
    files = {"trace": str(args.trace), "commands": profiling.nsight_commands(command(args))}
    if args.cuda_graph:
        # The parts of a step are inside the graph, so there is no breakdown.
        print(json.dumps(files) if args.json else f"timeline: {args.trace} (open in ui.perfetto.dev)")
        return 0
    found = profiling.breakdown(profiled)
    if args.json:
        print(json.dumps({**dataclasses.asdict(found), **files}, indent=1))
    else:
        print(render(found, args, on_cuda=found.total.device_ms > 0))
    return 0


def command(args: argparse.Namespace) -> str:
    """Return the command line that repeats this run."""
    from fastddpm.diagnostics import environment

    parts = [environment.executable(), "-m", "fastddpm", "profile"]
    for name in ("model", "batch", "steps", "dtype", "sampler", "device", "compile"):
        parts += [f"--{name}", str(getattr(args, name))]
    return shlex.join(parts + ["--cuda-graph"] * args.cuda_graph)


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
