"""The process that builds a package with torch.export and AOTInductor: it alone imports and holds the compiler."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastddpm.files.atomic import write_files
from fastddpm.machine import packages
from fastddpm.machine.building import Job


def main() -> None:
    """Build what the parent process has written to standard input."""
    import filelock

    order = torch.load(sys.stdin.buffer, weights_only=False)  # from the process that started this one
    identity, out = order["identity"], order["out"]
    torch.set_num_threads(int(identity["threads"]))
    if not order["waits"] and hasattr(os, "nice"):
        os.nice(19)
    path = packages.path_of(identity)
    packages.sweep()
    with contextlib.suppress(filelock.Timeout), packages.locked(path, -1 if order["waits"] else 0):
        if out is not None:
            write_files({out: compile_package(order["job"], identity, path.with_suffix(packages.WORK))})
        elif not packages.is_whole(path):
            packages.store(path, compile_package(order["job"], identity, path.with_suffix(packages.WORK)))


@torch.no_grad()
def compile_package(job: Job, identity: Mapping[str, str], folder: Path) -> bytes:
    """Compile a network, its weights as constants, and return the package.

    Args:
        job: the network, which is changed, and its arguments.
        identity: written into the package.
        folder: for intermediate files; removed.
    """
    from torch._inductor.package import package_aoti

    network, example = job
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700)
    (folder / packages.PID).write_text(str(os.getpid()))
    settings: dict[str, Any] = {
        "freezing": True,
        # Kernels are named in a profile; otherwise this costs nothing.
        "cpp.enable_kernel_profile": True,
        "aot_inductor.package": True,
        # Apart from Inductor's cache, which keeps what it has found out about the processor: ten seconds.
        "aot_inductor.output_path": str(folder),
        "aot_inductor.metadata": {packages.METADATA: json.dumps(dict(identity))},
    }
    try:
        if isinstance(network, bytes):
            graph = torch.export.load(io.BytesIO(network)).module(check_guards=False)
            _make_constant(graph)
        else:
            _make_constant(network)
            graph = torch.export.export(network, example, strict=False).module(check_guards=False)
        files = torch._inductor.aot_compile(graph, example, options=settings)
        package = folder / f"model{packages.SUFFIX}"
        package_aoti(str(package), files)  # type: ignore[arg-type]  # a list where "package" is set
        return package.read_bytes()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _make_constant(module: nn.Module) -> None:
    """Turn parameters into buffers that are saved: AOTInductor freezes no others."""
    for part in module.modules():
        for name, parameter in list(part._parameters.items()):
            if parameter is not None:
                del part._parameters[name]
                part.register_buffer(name, parameter.detach())
        part._non_persistent_buffers_set.clear()


if __name__ == "__main__":
    main()
