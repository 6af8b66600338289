"""``fastddpm inspect``: what each kernel variant, or a network's call, costs on a GPU, read from compiled code."""

from __future__ import annotations

import argparse
import itertools
import json
import textwrap
from typing import TYPE_CHECKING

from fastddpm.cli.parser import add_shared, examples, positive

if TYPE_CHECKING:
    from fastddpm.diagnostics.gpus import Gpu
    from fastddpm.diagnostics.inspect import Report

DESCRIPTION = """Compile every kernel variant, without a GPU, and print registers, spills, access widths, executed
instructions and bytes per element, and the roofline they imply."""

EPILOG = examples("fastddpm inspect p_sample", "fastddpm inspect --model cifar10 --batch 16")

WIDTH = 80
_HEADER = f"{'variant':<34}{'regs':>5}{'spill':>6}{'smem':>6}{'bar':>4}{'i/el':>6}{'B/el':>5}{'binds':>8}{'':>6}"
_LEGEND = """regs: registers per thread. spill, smem: bytes per thread and per program. bar: barriers. i/el: SASS
instructions executed per element. B/el: bytes per element to and from the tensors. binds: the roof that binds once the
tensors have left L2, and the time of the instructions as a share of DRAM's. Second line: bits of each access, by
tensor, and the size from which DRAM rather than L2 counts."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("--arch", action="append", metavar="ARCH", help="sm_75, sm_80, sm_90 (default), sm_100, ...")
    parser.add_argument("--gpu", metavar="NAME", help="GPU whose data sheet the roofline uses, such as 'H100 SXM'")
    parser.add_argument("kernel", nargs="?", help="only this one: p_sample, q_sample, ddpm_loss, noise or group_norm")
    model = "instead, the kernels of a call of this network: shipped model, directory, or cifar10"
    parser.add_argument("--model", help=model)
    parser.add_argument("--batch", type=positive, default=16, help="of the network's input")
    add_shared(parser, "json")


def run(args: argparse.Namespace) -> int:
    """Compile, measure, print."""
    from fastddpm.diagnostics import gpus, inspect
    from fastddpm.diagnostics import variants as kernel_variants

    if args.model:
        return _network(args)
    variants = [v for v in kernel_variants.variants() if args.kernel in (None, v.kernel)]
    if not variants:
        stems = sorted({v.kernel for v in kernel_variants.variants()})
        raise ValueError(f"no kernel {args.kernel!r}; use one of {', '.join(stems)}")
    gpu = gpus.find_gpu(args.gpu) if args.gpu else None
    archs = args.arch or [gpu.arch if gpu else "sm_90"]
    if gpu is not None and archs != [gpu.arch]:
        raise ValueError(f"{gpu.name} is {gpu.arch}, not {', '.join(archs)}; leave --arch or --gpu out")
    reports = {arch: inspect.inspect_all(variants, arch, gpu) for arch in archs}
    if args.json:
        print(json.dumps([report.to_dict() for arch in archs for report in reports[arch]], indent=1))
    else:
        for arch in archs:
            print(render(arch, gpu or gpus.default_gpu(arch), reports[arch]))
    return 0


def _network(args: argparse.Namespace) -> int:
    from fastddpm.benchmarks.peers import networks
    from fastddpm.diagnostics.network_cost import KINDS, Cost, network_cost
    from fastddpm.unet.load import load

    if args.kernel or args.gpu:
        raise ValueError("--model takes --arch and --batch, no kernel and no --gpu")
    config = networks.config(args.model) if args.model in networks.TITLES else load(args.model).config
    for arch in args.arch or ["sm_90"]:
        norms = {name: network_cost(config, args.batch, arch, fuse=name == "fused") for name in ("torch", "fused")}
        if args.json:
            print(json.dumps({"arch": arch, "batch": args.batch, "norm": norms}, default=Cost._asdict))
            continue
        totals = [Cost(*map(sum, zip(*costs.values(), strict=True))) for costs in norms.values()]
        print(f"{args.model}, batch {args.batch}, bfloat16, {arch}: launches of a call, and MB an image that they move")
        print(f"{'':<20}{'norm=torch':>18}{'norm=fused':>18}")
        for kind in (*KINDS, "all"):
            pair = totals if kind == "all" else [costs[kind] for costs in norms.values()]
            cells = (f"{cost.launches:>9}{cost.bytes / args.batch / 1e6:>9.2f}" for cost in pair)
            print(f"{kind:<20}{''.join(cells)}")
    return 0


def render(arch: str, gpu: Gpu | None, reports: list[Report]) -> str:
    """A table of at most 80 columns."""
    lines = _heading(arch, gpu)
    for kernel, variants in itertools.groupby(reports, lambda report: report.kernel):
        lines += ["", kernel, _HEADER.rstrip(), *itertools.chain.from_iterable(map(_row, variants))]
    lines += ["", *textwrap.wrap(_LEGEND, WIDTH)]
    return "\n".join(lines)


def _heading(arch: str, gpu: Gpu | None) -> list[str]:
    if gpu is None:
        return [f"{arch}: no data sheet on file, no roofline"]
    dram, issue = f"DRAM {gpu.bandwidth / 1e12:.2f} TB/s", f"issue {gpu.issue_rate / 1e12:.1f} T instructions/s"
    return textwrap.wrap(f"{arch}, {gpu.name}: {dram}, {issue}, L2 {gpu.l2 >> 20} MB ({gpu.source})", WIDTH)


def _row(report: Report) -> list[str]:
    from fastddpm.diagnostics.inspect import summarise_widths

    executed = "-" if report.executed is None else f"{report.executed:.1f}"
    share = "" if report.compute_share is None else f"{report.compute_share:.2f}"
    lines = [
        f"{report.variant:<34}{report.registers:>5}{report.spills:>6}{report.shared:>6}{report.barriers:>4}"
        f"{executed:>6}{report.bytes_per_element:>5.3g}{report.roof or '-':>8}{share:>6}"
    ]
    details = summarise_widths(report.widths)
    if report.l2_elements is not None:
        details += f"; DRAM counts from {report.l2_elements / 1e6:.1f} M elements"
    for text in (details, *report.notes, *(f"left out: {reason}" for reason in report.avoided)):
        lines += textwrap.wrap(text, WIDTH, initial_indent="  ", subsequent_indent="    ")
    return lines
