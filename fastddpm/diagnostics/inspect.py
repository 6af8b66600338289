"""Compile every kernel variant for an architecture without a GPU and report what it costs.

Registers, spills, shared memory and barriers come from the binary; instructions executed per element from a walk of
its SASS; access widths from the PTX, by tensor; bytes per element from the tensors' types; and the roofline from a
GPU's data sheet. Behind ``fastddpm inspect``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from fastddpm.diagnostics import compile_offline as offline
from fastddpm.diagnostics.gpus import Gpu, default_gpu, roofline
from fastddpm.diagnostics.ptx import accesses
from fastddpm.diagnostics.sass import SassError
from fastddpm.diagnostics.sass_walk import Walk, walk
from fastddpm.diagnostics.variants import Variant

Widths = Mapping[str, Mapping[str, tuple[int, ...]]]
_AMD_ACCESS = re.compile(r"^\s+(?:global|buffer)_(load|store)_(\w+)", re.MULTILINE)
_AMD_BITS = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32, "ushort": 16, "short": 16, "byte": 8}


@dataclass(frozen=True)
class Report:
    """What one variant costs on one architecture.

    Attributes:
        registers: per thread.
        spills, shared: bytes per thread and per program.
        barriers: in the listing.
        executed: SASS instructions executed per element; None where there is no SASS to walk.
        classes: the same by class.
        avoided: rare paths left out of the count.
        widths: bits of each load or store instruction, by tensor and direction; "x_t" and "load" for instance.
        bytes_per_element: to and from the tensors that scale with the batch.
        loads, stores: bits of each global access in the SASS, with how often a thread executes it; coefficients too.
        gpu: whose data sheet the roofline uses; None where none is on file.
        roof: what binds outside L2: "DRAM", "issue" or "integer".
        compute_share: time of the slower of issue and integer as a share of DRAM's.
        l2_elements: elements up to which the tensors fit into L2.
        notes: what could not be counted, and why.
    """

    kernel: str
    variant: str
    arch: str
    registers: int
    spills: int
    shared: int
    bytes_per_element: float
    barriers: int = 0
    executed: float | None = None
    classes: Mapping[str, float] = field(default_factory=dict)
    avoided: tuple[str, ...] = ()
    widths: Widths = field(default_factory=dict)
    loads: Mapping[int, int] = field(default_factory=dict)
    stores: Mapping[int, int] = field(default_factory=dict)
    gpu: str | None = None
    roof: str | None = None
    compute_share: float | None = None
    l2_elements: int | None = None
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        return asdict(self)


def inspect_variant(variant: Variant, arch: str, gpu: Gpu | None = None) -> Report:
    """Compile one variant for an architecture and measure it.

    Args:
        variant: see ``variants.variants``.
        arch: "sm_NN" or "gfxNNN".
        gpu: data sheet for the roofline; the architecture's default if not given.

    Raises:
        BackendUnavailable: if Triton or one of its tools is missing.
    """
    compiled = offline.compile_launch(variant.launch, arch)
    measures = measure(compiled, variant.elements_per_program, variant.bytes_per_element, variant.trips, gpu)
    if arch.startswith("sm_"):
        found = accesses(compiled.assembly, variant.launch.signature)
        measures["widths"] = {label: found[name] for name, label in variant.tensors.items() if name in found}
    return Report(variant.kernel, variant.name, **measures)


def measure(
    compiled: offline.Compiled,
    elements_per_program: float,
    bytes_per_element: float,
    trips: Sequence[int] = (),
    gpu: Gpu | None = None,
) -> dict[str, Any]:
    """Return what compiled code occupies and executes, by the fields of a `Report`; ``trips`` as in `walk`."""
    used = offline.resources(compiled)
    found: dict[str, Any] = {"arch": compiled.arch, "bytes_per_element": bytes_per_element}
    found |= {"registers": used.registers, "spills": used.spills, "shared": used.shared}
    if not compiled.arch.startswith("sm_"):
        return found | _amd_measures(compiled.assembly)
    listing = offline.disassemble(compiled)
    found["barriers"] = len(re.findall(r"\bBAR\.", listing))
    try:
        result = walk(listing, compiled.name, trips)
    except SassError as error:
        return {**found, "notes": (f"not counted: {error}",)}
    elements = elements_per_program / compiled.threads
    executed = result.executed / elements
    classes = {name: count / elements for name, count in result.classes.items()}
    found |= {"executed": executed, "classes": classes, "avoided": result.avoided}
    found |= {"loads": _bits(result, "LDG"), "stores": _bits(result, "STG")}
    gpu = gpu or default_gpu(compiled.arch)
    if gpu is not None:
        roof = roofline(gpu, bytes_per_element, executed, classes)
        found |= {"gpu": gpu.name, "roof": roof.binds, "compute_share": roof.compute_share}
        found["l2_elements"] = roof.l2_elements
    return found


def _bits(result: Walk, stem: str) -> dict[int, int]:
    return {8 * width: count for width, count in result.widths(stem).items()}


def _amd_measures(assembly: str) -> dict[str, Any]:
    widths: dict[str, tuple[int, ...]] = {}
    for direction, size in _AMD_ACCESS.findall(assembly):
        bits = next((bits for name, bits in _AMD_BITS.items() if size.startswith(name)), 0)
        widths[direction] = (*widths.get(direction, ()), bits)
    return {
        "barriers": len(re.findall(r"^\s+s_barrier", assembly, re.MULTILINE)),
        "widths": {"all": widths},
        "notes": ("AMD code is compiled and its resources read; its instructions are not walked",),
    }


def summarise_widths(widths: Widths) -> str:
    """One phrase: each tensor with the widths of its accesses, such as "x_t 128, m 64, x_prev 128"."""
    parts = []
    for tensor, directions in widths.items():
        bits = Counter(bits for values in directions.values() for bits in values)
        parts.append(f"{tensor} {'/'.join(str(b) for b in sorted(bits, reverse=True))}")
    return ", ".join(parts)


def inspect_all(variants: Iterable[Variant], arch: str, gpu: Gpu | None = None) -> list[Report]:
    """Measure many variants on one architecture."""
    return [inspect_variant(variant, arch, gpu) for variant in variants]
