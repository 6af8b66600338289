"""``fastddpm env``: versions, devices, and which backend would be used and why. Part of every bug report."""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Mapping
from typing import Any

from fastddpm.cli.parser import add_shared, examples

DESCRIPTION = "Show versions, processor, GPUs, threads, caches, and which backend runs the fused operations."
EPILOG = examples("fastddpm env", "fastddpm env --json > env.json")

WIDTH = 80
_LABEL = 29


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add_shared(parser, "json")


def run(args: argparse.Namespace) -> int:
    """Print the facts."""
    from fastddpm.diagnostics import environment

    facts = environment.facts()
    print(json.dumps(facts, indent=1) if args.json else render(facts))
    return 0


def render(facts: Mapping[str, Any]) -> str:
    """Text of at most 80 columns, one fact a line."""
    lines = [_line("Python", f"{facts['python']} on {facts['system']}")]
    lines += [_line(name, version or "not installed") for name, version in facts["versions"].items()]
    lines += ["", *_cpu_lines(facts), "", *_cuda_lines(facts["cuda"]), ""]
    for backend in facts["backends"]:
        lines.append(_line(f"fused ops, {backend['device']}", f"backend='auto' takes {backend['auto']}"))
        lines.append(_line("", backend["why"]))
    compiles = facts["compiles"]
    lines.append(_line("torch.compile", f"CPU: {_yes(compiles['cpp_compiler'], 'no C++ compiler found (set CXX)')}"))
    if facts["cuda"]["available"]:
        lines.append(_line("", f"CUDA: {_yes(compiles['triton'], 'Triton is not installed')}"))
    lines += [_cache_line(name, cache) for name, cache in compiles["caches"].items()]
    return "\n".join(lines)


def _cpu_lines(facts: Mapping[str, Any]) -> list[str]:
    cpu, threads = facts["cpu"], facts["threads"]
    quota = "" if cpu["quota_cores"] is None else f", limited to {cpu['quota_cores']:g}"
    load = facts["load_average"]
    lines = [
        _line("CPU", f"{cpu['model']} ({cpu['architecture']})"),
        _line("cores", f"{cpu['usable_cores']} of {cpu['cores']} usable{quota}"),
        _line("threads", f"{threads['intra_op']} within an operation, {threads['inter_op']} between"),
        _line("flags", " ".join(cpu["flags"]) or "none that matters"),
        _line("bfloat16", _yes(cpu["native_bfloat16"], "emulated: float32 is faster", "native")),
        _line("memory", f"{facts['memory_gib']} GiB"),
        _line("load average", "unknown" if load is None else " ".join(map(str, load))),
    ]
    for variables in facts["environment"].values():
        lines += [_line("environment", f"{name}={value}") for name, value in variables.items()]
    return lines


def _cuda_lines(cuda: Mapping[str, Any]) -> list[str]:
    if not cuda["available"]:
        return [_line("CUDA", f"not available: {cuda['reason']}")]
    lines = [_line("CUDA", f"{cuda['build']}")]
    if cuda.get("tf32_convolutions"):
        lines.append(_line("", "float32 convolutions in TF32, PyTorch's default"))
    for device in cuda["devices"]:
        figures = f"compute capability {device['capability']}, {device['memory_gib']} GiB"
        lines.append(_line(f"cuda:{device['index']}", f"{device['name']}, {figures}"))
        if "sm_clock_mhz" in device:
            lines.append(
                _line("", f"{device['sm_clock_mhz']} of {device['max_sm_clock_mhz']} MHz, driver {device['driver']}")
            )
    return lines


def _cache_line(name: str, cache: Mapping[str, Any]) -> str:
    remark = "" if cache["writable"] else f"; cannot be written: set {name} to a folder of yours"
    if cache["others_can_write"]:
        part = "it" if cache["others_can_write"] == cache["path"] else cache["others_can_write"]
        remark += f"; OTHERS CAN WRITE to {part}, and its code is executed: set {name} to a folder of yours"
    return _line(name, cache["path"] + remark)


def _yes(value: bool, otherwise: str, yes: str = "yes") -> str:
    return yes if value else otherwise


def _line(label: str, text: str) -> str:
    return textwrap.fill(
        text,
        WIDTH,
        initial_indent=f"{label:<{_LABEL}}",
        subsequent_indent=" " * _LABEL,
        break_long_words=False,
        break_on_hyphens=False,
    ).rstrip()
