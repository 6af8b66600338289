"""What can be counted of the GPU path without a GPU: instructions executed and bytes moved per element, from SASS.

Counts of compiled code, not times: what binds on a real device, and whether two kernels tie, the CUDA part must show.
"""

from __future__ import annotations

from typing import Any

from fastddpm.benchmarks.counts import inductor_kernel

from fastddpm.diagnostics import inspect
from fastddpm.diagnostics.gpus import default_gpu
from fastddpm.diagnostics.inspect import Report
from fastddpm.diagnostics.variants import variants
from fastddpm.errors import BackendUnavailable, FastDDPMError


def measure(arch: str = "sm_90", *, smoke: bool = False) -> dict[str, Any]:
    """Compile our kernels and Inductor's for an architecture; remarks stand where something cannot be had.

    Returns:
        "arch", "gpu", "rows" ("who", and what `diagnostics.inspect.Report` has) and "remarks".
    """
    gpu = default_gpu(arch)
    rows: list[dict[str, Any]] = []
    remarks: list[str] = []
    for who, collect in (("fastddpm", _ours), ("Inductor", _inductor)):
        try:
            rows += [{"who": who, **report.to_dict()} for report in collect(arch, smoke)]
        except (FastDDPMError, ImportError) as error:
            remarks.append(f"{who}: {' '.join(str(error).split())}")
    return {"arch": arch, "gpu": gpu.name if gpu else None, "rows": rows, "remarks": remarks}


def _ours(arch: str, smoke: bool) -> list[Report]:
    found = [v for v in variants() if not smoke or (v.kernel, v.name) == ("p_sample", "float32")]
    return inspect.inspect_all(found, arch)


def _inductor(arch: str, smoke: bool) -> list[Report]:
    if smoke:
        raise BackendUnavailable("left out of a smoke run")
    return [inductor_kernel.measure(arch)]
