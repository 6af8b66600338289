"""Compile Triton kernels without a GPU, and read what the compiler made of them.

The only module of the library that uses Triton's unstable interfaces (its compiler's entry points and the NVIDIA tools
it ships); tried with Triton 3.8 and 3.9.
"""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import tempfile
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from fastddpm.checks import one_of
from fastddpm.errors import BackendUnavailable

ARCHITECTURES = ("sm_75", "sm_80", "sm_90", "sm_100", "sm_120", "gfx90a", "gfx942")
_ALIGNED: list[Any] = [["tt.divisibility", 16]]


@dataclass(frozen=True)
class Compiled:
    """A kernel compiled for one architecture.

    Attributes:
        arch: "sm_90" or "gfx942".
        binary: cubin, or the code object.
    """

    name: str
    arch: str
    assembly: str
    binary: bytes
    threads: int


@dataclass(frozen=True)
class Resources:
    """What one thread or program occupies: registers, spills in bytes, stack and shared memory in bytes."""

    registers: int
    spills: int
    stack: int
    shared: int


def load_triton() -> ModuleType:
    """Import Triton in the form that compiles.

    Raises:
        BackendUnavailable: if Triton is missing, or was asked to interpret kernels instead of compiling them.
    """
    try:
        triton = importlib.import_module("triton")
    except ImportError as error:
        raise BackendUnavailable(
            f"Triton cannot be imported ({error}); install it with 'pip install triton'"
        ) from error
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise BackendUnavailable("TRITON_INTERPRET is set, so kernels are interpreted and not compiled; unset it")
    return triton


def compile_kernel(
    kernel: Any,
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
    arch: str,
    *,
    aligned: Collection[str] = (),
    options: Mapping[str, Any] | None = None,
) -> Compiled:
    """Compile a ``triton.jit`` function for an architecture; no GPU is needed.

    Args:
        signature: Triton type of each argument that is no constant, such as ``{"x_ptr": "*fp32", "n": "i64"}``.
        constants: value of each ``tl.constexpr`` argument; None for a pointer that is not passed.
        arch: one of ``ARCHITECTURES``, or another "sm_NN" or "gfxNNN" that Triton knows.
        aligned: arguments that are multiples of 16.
        options: further compile options, which win: else 4 warps, and no contraction.

    Raises:
        ValueError: for an architecture that is neither "sm_NN" nor "gfxNNN".
        BackendUnavailable: if Triton is missing or its compiler no longer has the expected form.
    """
    triton = load_triton()
    names = list(kernel.arg_names)
    full = {name: "constexpr" if name in constants else signature[name] for name in names}
    # Constants carry an empty list, as in a launch: both then share one entry of Triton's cache.
    marked = [name for name in names if name in constants or name in aligned]
    attributes = {(names.index(name),): [] if name in constants else _ALIGNED for name in marked}
    try:
        source_type = importlib.import_module("triton.compiler").ASTSource
        target = _target(arch)
        source = source_type(fn=kernel, signature=full, constexprs=dict(constants), attrs=attributes)
    except (ImportError, AttributeError, TypeError) as error:
        raise BackendUnavailable(
            f"Triton {triton.__version__} has no compiler interface of the form known here ({error}); "
            "use Triton 3.8 or 3.9"
        ) from error
    all_options = {"num_warps": 4, "enable_fp_fusion": False, **(options or {})}
    compiled = triton.compile(source, target=target, options=all_options)
    kind = ("ptx", "cubin") if arch.startswith("sm_") else ("amdgcn", "hsaco")
    return Compiled(
        name=compiled.metadata.name,
        arch=arch,
        assembly=compiled.asm[kind[0]],
        binary=compiled.asm[kind[1]],
        threads=compiled.metadata.num_warps * target.warp_size,
    )


def compile_launch(launch: Any, arch: str) -> Compiled:
    """Compile the code that a ``kernels.launch.Launch`` runs; see `compile_kernel`."""
    return compile_kernel(launch.kernel, launch.signature, launch.constants, arch, options=launch.options)


def compile_together(launches: Iterable[Any]) -> None:
    """Compile for the current device what launches run, as many at a time as there are cores."""
    # Older releases of Triton compile one after the other.
    mode = getattr(load_triton(), "AsyncCompileMode", nullcontext)
    with ThreadPoolExecutor(os.cpu_count()) as pool, mode(pool):
        for launch in launches:
            launch.compile()


def check_arch(arch: str) -> None:
    """Raise ValueError for what is no architecture's name, or one that is too old: the kernels need sm_75."""
    if not re.fullmatch(r"gfx\w+|sm_(7[5-9]|[89]\d|\d{3,})", arch):
        one_of("architecture", arch, ARCHITECTURES)


def _target(arch: str) -> Any:
    check_arch(arch)
    target = importlib.import_module("triton.backends.compiler").GPUTarget
    return target("cuda", int(arch[3:]), 32) if arch.startswith("sm_") else target("hip", arch, 64)


def _run_tool(name: str, arguments: list[str], binary: bytes) -> str:
    """Print a binary with an NVIDIA tool that Triton ships."""
    tool = Path(str(load_triton().__file__)).parent / "backends" / "nvidia" / "bin" / name
    if not tool.is_file():
        raise BackendUnavailable(f"this build of Triton ships no {name} (expected {tool}); install triton from PyPI")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        result = subprocess.run([tool, *arguments, file.name], capture_output=True, text=True, check=False)
    if result.returncode:
        raise BackendUnavailable(f"{name} failed: {result.stderr.strip() or result.stdout.strip()}")
    return result.stdout


def disassemble(compiled: Compiled) -> str:
    """SASS of a compiled NVIDIA kernel, with labels, as nvdisasm prints it."""
    return _run_tool("nvdisasm", ["-c"], compiled.binary)


def resources(compiled: Compiled) -> Resources:
    """Registers, spills, stack and shared memory of a compiled kernel."""
    if not compiled.arch.startswith("sm_"):
        return _amd_resources(compiled)
    text = _run_tool("cuobjdump", ["--dump-resource-usage"], compiled.binary)
    fields = {key: int(value) for key, value in re.findall(r"([A-Z]+):(\d+)", text.split("Function", 1)[-1])}
    try:
        stack, local = fields["STACK"], fields["LOCAL"]
        return Resources(fields["REG"], spills=stack + local, stack=stack, shared=fields["SHARED"])
    except KeyError as error:
        raise BackendUnavailable(f"cuobjdump's resource usage has no field {error}: {text.strip()!r}") from error


def _amd_resources(compiled: Compiled) -> Resources:
    fields = dict(re.findall(r"\.(\w+):\s+(\d+)", compiled.assembly.split(".amdgpu_metadata", 1)[-1]))
    spilled = int(fields["vgpr_spill_count"]) + int(fields["sgpr_spill_count"])
    stack = int(fields["private_segment_fixed_size"])
    return Resources(int(fields["vgpr_count"]), 4 * spilled, stack, int(fields["group_segment_fixed_size"]))
