"""The kernel that torch.compile makes of the plain PyTorch step, for a GPU that is not there.

The yardstick for the fused step's instruction count. The step is traced under FakeTensorMode on "cuda", lowered by
Inductor for a stub device, and the Triton source it writes is compiled as `compile_offline` compiles ours. All of it
is Inductor's inside, which moves between releases: tried with torch 2.14 (a CUDA build; a CPU build has no such
tensors). Whatever breaks raises `BackendUnavailable` with what happened, which the report shows.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastddpm.diagnostics import compile_offline as offline
from fastddpm.diagnostics.lowering import inductor_for, replaced
from fastddpm.diagnostics.sass_walk import walk
from fastddpm.errors import BackendUnavailable

# (XBLOCK, warps): Inductor takes 1024 and 4 for a large tensor, others when asked to tune; the best one is reported.
CONFIGS = ((512, 4), (1024, 4), (2048, 4), (2048, 8))


@dataclass(frozen=True)
class InductorKernel:
    """What one configuration of Inductor's kernel costs.

    Attributes:
        executed: SASS instructions per element.
        registers, spills, shared, barriers: as in `fastddpm.diagnostics.inspect.Report`.
        avoided: rare paths left out of the count.
        bytes_per_element: to and from the tensors.
    """

    block: int
    warps: int
    executed: float
    registers: int
    spills: int
    shared: int
    barriers: int
    avoided: tuple[str, ...]
    bytes_per_element: int = 12


def measure(arch: str = "sm_90", shape: tuple[int, ...] = (64, 3, 32, 32)) -> InductorKernel:
    """Return Inductor's best configuration for the step, by instructions executed.

    Raises:
        BackendUnavailable: this torch or Triton cannot be asked; the message has the reason.
    """
    with inductor_for(arch):
        name, source = find_kernel(generate(shape))
        return min((_compile(name, source, arch, *config) for config in CONFIGS), key=lambda kernel: kernel.executed)


def step(x_t: Tensor, eps_theta: Tensor, table: Tensor, t: Tensor) -> Tensor:
    """The step as people write it, coefficients in one table [T, 5] (Ho et al. 2020, eqs. 7 and 15)."""
    # aten's indexing: Python's would touch the driver.
    rows = torch.ops.aten.index.Tensor(table, [t])
    recip, recipm1, coef1, coef2, sigma = (c.reshape(-1, *(1,) * (x_t.dim() - 1)) for c in rows.unbind(1))
    x_0 = (recip * x_t - recipm1 * eps_theta).clamp(-1, 1)
    return coef1 * x_0 + coef2 * x_t + sigma * torch.randn_like(x_t)


def generate(shape: tuple[int, ...]) -> str:
    """Return the Python module that Inductor writes for `step`, its Triton kernels inside as strings."""
    from torch._inductor.debug import DebugContext
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.fx_passes.replace_random import replace_random_passes
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    fake = FakeTensorMode()
    with fake:
        x = torch.empty(shape, device="cuda")
        table, t = torch.empty(1000, 5, device="cuda"), torch.empty(shape[0], dtype=torch.int64, device="cuda")
        inputs = [x, torch.empty_like(x), table, t]
        traced = make_fx(step, decomposition_table=select_decomp_table())(*inputs)
    with V.set_fake_mode(fake), fake:
        replace_random_passes(traced)
    graph = GraphLowering(traced, example_inputs=inputs, shape_env=None)  # type: ignore[arg-type]
    with V.set_graph_handler(graph), V.set_fake_mode(fake), DebugContext():
        graph.run(*inputs)
        code: Any = graph.codegen()[0]
    return getattr(code, "value", code)


def find_kernel(module: str) -> tuple[str, str]:
    """Return name and source of the one Triton kernel in a generated module.

    Raises:
        BackendUnavailable: there are several, or none: the step was not fused into one.
    """
    kernels = re.findall(r"async_compile\.triton\('(\w+)', '''(.*?)''', device_str", module, re.DOTALL)
    if len(kernels) != 1:
        raise BackendUnavailable(f"Inductor made {len(kernels)} Triton kernels of the step instead of one")
    return kernels[0]


def _compile(name: str, source: str, arch: str, block: int, warps: int) -> InductorKernel:
    """Compile the kernel for one configuration and walk its SASS."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "generated.py"
        path.write_text(source)
        meta, function = _load(path, name)
        signature = {arg: kind for arg, kind in meta["signature"].items() if kind != "constexpr"}
        aligned = [list(meta["signature"])[index[0]] for index, _ in meta["configs"][0].items()]
        compiled = offline.compile_kernel(
            function,
            signature,
            {"XBLOCK": block, **meta["constants"]},
            arch,
            aligned=aligned,
            options={"num_warps": warps, "enable_fp_fusion": meta.get("enable_fp_fusion", True)},
        )
    listing = offline.disassemble(compiled)
    result = walk(listing, compiled.name)
    used = offline.resources(compiled)
    return InductorKernel(
        block=block,
        warps=warps,
        executed=result.executed / (block / compiled.threads),
        registers=used.registers,
        spills=used.spills,
        shared=used.shared,
        barriers=result.barriers,
        avoided=result.avoided,
    )


def _load(path: Path, name: str) -> tuple[dict[str, Any], Any]:
    """Import a generated kernel without its launcher: what its decorator was given, and the jitted function."""
    given: dict[str, Any] = {}

    def pointwise(**arguments: Any) -> Any:
        given.update(arguments["triton_meta"])
        return lambda function: function

    runtime = "torch._inductor.runtime"
    with replaced(
        {
            f"{runtime}.triton_heuristics.pointwise": pointwise,
            f"{runtime}.triton_helpers.set_driver_to_gpu": lambda: None,
        }
    ):
        module = _import(path)
    return given, getattr(module, name)


def _import(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"fastddpm_generated_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
