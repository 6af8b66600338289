"""``fastddpm verify``: check on this machine what the library promises to the bit."""

from __future__ import annotations

import argparse
import json
import textwrap
from typing import Any

from fastddpm.cli.parser import add_shared, examples

DESCRIPTION = """Check noise, kernels and the sampling loop on this machine. Exit status: 0 if nothing failed, 1
otherwise. What cannot run here is left out, with the reason."""

EPILOG = examples("fastddpm verify", "fastddpm verify --device cuda:1 --json")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add_shared(parser, "device", "json")


def run(args: argparse.Namespace) -> int:
    """Run the checks, print each as it ends, and the verdict."""
    from fastddpm.diagnostics.verify import Result, verify
    from fastddpm.machine.devices import resolve_device

    device = resolve_device(args.device)
    results: list[Result] = []
    for result in verify(device):
        if not args.json:
            alike = (r.name for r in results if r.status == result.status == "left out" and r.detail == result.detail)
            first = next(alike, None)
            print(_line(result if first is None else result._replace(detail=f"as {first!r}")), flush=True)
        results.append(result)
    if args.json:
        print(json.dumps({"device": str(device), "checks": [r._asdict() for r in results]}, indent=1))
    else:
        print(_verdict(str(device), results))
    return int(any(r.status == "failed" for r in results))


def _line(result: Any) -> str:
    head = f"{result.name:<20} {result.status:<9} {result.seconds:6.1f} s  "
    return textwrap.fill(result.detail, 80, initial_indent=head, subsequent_indent=" " * len(head))


def _verdict(device: str, results: list[Any]) -> str:
    counts = {status: sum(r.status == status for r in results) for status in ("passed", "failed", "left out")}
    verdict = "FAILED" if counts["failed"] else "verified"
    tail = ", the GPU path among them" if counts["left out"] and device == "cpu" else ""
    summary = f"{counts['passed']} passed, {counts['failed']} failed, {counts['left out']} left out{tail}"
    return f"{device}: {verdict} ({summary})"
