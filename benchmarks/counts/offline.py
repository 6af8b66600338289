"""What can be counted of the GPU path without a GPU: instructions executed and bytes moved per element, from SASS.

Counts of compiled code, not times: what binds on a real device, and whether two kernels tie, the CUDA part must show.
"""

from __future__ import annotations

from typing import Any

from fastddpm.benchmarks.counts import inductor_kernel

from fastddpm.diagnostics.gpus import default_gpu
from fastddpm.errors import BackendUnavailable, FastDDPMError

DEFAULT_ARCH = "sm_90"
# Of `fastddpm inspect`'s variants, those that a sampling step of a user is likely to run.
_SMOKE_VARIANTS = ("float32",)


def measure(arch: str = DEFAULT_ARCH, *, smoke: bool = False) -> dict[str, Any]:
    """Compile our kernels and Inductor's for an architecture; remarks stand where something cannot be had.

    Returns:
        "arch", "gpu", "rows" (kernel, variant, executed, bytes_per_element, registers, shared, barriers, roof) and
        "remarks".
    """
    gpu = default_gpu(arch)
    rows: list[dict[str, Any]] = []
    remarks: list[str] = []
    for collect in (_ours, _inductor):
        try:
            rows += collect(arch, smoke)
        except (FastDDPMError, ImportError) as error:
            remarks.append(f"{collect.__name__.strip('_')}: {' '.join(str(error).split())}")
    return {"arch": arch, "gpu": gpu.name if gpu else None, "rows": rows, "remarks": remarks}


def _ours(arch: str, smoke: bool) -> list[dict[str, Any]]:
    from fastddpm.diagnostics import inspect
    from fastddpm.diagnostics import variants as kernel_variants

    found = kernel_variants.variants()
    if smoke:
        found = [v for v in found if v.kernel == "p_sample" and v.name in _SMOKE_VARIANTS]
    rows = []
    for report in inspect.inspect_all(found, arch):
        row = report.to_dict()
        keys = (
            "kernel",
            "variant",
            "executed",
            "bytes_per_element",
            "registers",
            "spills",
            "shared",
            "barriers",
            "roof",
        )
        rows.append({"who": "fastddpm", **{key: row[key] for key in keys}})
    return rows


def _inductor(arch: str, smoke: bool) -> list[dict[str, Any]]:
    if smoke:
        raise BackendUnavailable("left out of a smoke run")
    kernel = inductor_kernel.measure(arch)
    return [
        {
            "who": "Inductor",
            "kernel": "p_sample",
            "variant": f"plain step, block {kernel.block}, {kernel.warps} warps",
            "executed": kernel.executed,
            "bytes_per_element": kernel.bytes_per_element,
            "registers": kernel.registers,
            "spills": kernel.spills,
            "shared": kernel.shared,
            "barriers": kernel.barriers,
            "roof": None,
        }
    ]
