"""The kernel that torch.compile makes of the plain PyTorch step, for a GPU that is not there.

The yardstick for the fused step's instruction count. The step is traced under FakeTensorMode on "cuda", lowered by
Inductor for a stub device, and the Triton source it writes is compiled as `compile_offline` compiles ours. All of it
is Inductor's inside, which moves between releases: tried with torch 2.14 (a CUDA build; a CPU build has no such
tensors). Whatever breaks raises `BackendUnavailable` with what happened, which the report shows.
"""

from __future__ import annotations

import math
import re
import runpy
import tempfile
from typing import Any

import torch
from torch import Tensor

from fastddpm.diagnostics import compile_offline as offline
from fastddpm.diagnostics import inspect
from fastddpm.diagnostics.inspect import Report
from fastddpm.diagnostics.lowering import generate, inductor_for, replaced
from fastddpm.errors import BackendUnavailable

# (XBLOCK, warps): Inductor takes 1024 and 4 for a large tensor, others when asked to tune; the best one is reported.
CONFIGS = ((512, 4), (1024, 4), (2048, 4), (2048, 8))


def measure(arch: str = "sm_90", shape: tuple[int, ...] = (64, 3, 32, 32)) -> Report:
    """Return Inductor's best configuration for the step, by instructions executed.

    Raises:
        BackendUnavailable: this torch or Triton cannot be asked; the message has the reason.
    """
    with inductor_for(arch):
        x, table = torch.empty(shape, device="meta"), torch.empty(1000, 5, device="meta")
        t = torch.empty(shape[0], dtype=torch.int64, device="meta")
        name, source = find_kernel(generate(step, [x, torch.empty_like(x), table, t])[1])
        reports = [_compile(name, source, arch, *config) for config in CONFIGS]
    return min(reports, key=lambda report: report.executed or math.inf)


def step(x_t: Tensor, eps_theta: Tensor, table: Tensor, t: Tensor) -> Tensor:
    """The step as people write it, coefficients in one table [T, 5] (Ho et al. 2020, eqs. 7 and 15)."""
    recip, recipm1, coef1, coef2, sigma = (c.reshape(-1, *(1,) * (x_t.dim() - 1)) for c in table[t].unbind(1))
    x_0 = (recip * x_t - recipm1 * eps_theta).clamp(-1, 1)
    return coef1 * x_0 + coef2 * x_t + sigma * torch.randn_like(x_t)


def find_kernel(module: str) -> tuple[str, str]:
    """Return name and source of the one Triton kernel in a generated module.

    Raises:
        BackendUnavailable: there are several, or none: the step was not fused into one.
    """
    kernels = re.findall(r"async_compile\.triton\('(\w+)', '''(.*?)''', device_str", module, re.DOTALL)
    if len(kernels) != 1:
        raise BackendUnavailable(f"Inductor made {len(kernels)} Triton kernels of the step instead of one")
    return kernels[0]


def _compile(name: str, source: str, arch: str, block: int, warps: int) -> Report:
    """Compile the kernel for one configuration and measure it; it moves x_t, eps_theta and x_{t-1}."""
    meta, function = _load(name, source)
    signature = {arg: kind for arg, kind in meta["signature"].items() if kind != "constexpr"}
    compiled = offline.compile_kernel(
        function,
        signature,
        {"XBLOCK": block, **meta["constants"]},
        arch,
        aligned=[list(meta["signature"])[index] for (index,) in meta["configs"][0]],
        options={"num_warps": warps, "enable_fp_fusion": meta.get("enable_fp_fusion", True)},
    )
    return Report("p_sample", f"plain step, block {block}, {warps} warps", **inspect.measure(compiled, block, 12))


def _load(name: str, source: str) -> tuple[dict[str, Any], Any]:
    """Run a generated module without its launcher: what the kernel's decorator was given, and the jitted function."""
    given: dict[str, Any] = {}

    def pointwise(**arguments: Any) -> Any:
        given.update(arguments["triton_meta"])
        return lambda function: function

    answers = {"triton_heuristics.pointwise": pointwise, "triton_helpers.set_driver_to_gpu": lambda: None}
    with (
        tempfile.NamedTemporaryFile("w", suffix=".py") as file,
        replaced({f"torch._inductor.runtime.{name}": answer for name, answer in answers.items()}),
    ):
        file.write(source)
        file.flush()
        # Triton reads a function's source from its file.
        return given, runpy.run_path(file.name)[name]
