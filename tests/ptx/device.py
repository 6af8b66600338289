"""A Triton driver without a GPU: launches are recorded and, if wanted, executed by the PTX interpreter.

The kernels' own launchers run unchanged, on CPU tensors: Triton binds the arguments, picks the specialisation and
compiles for the target as it would on a GPU; what reaches the driver is run on the tensors' own memory.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget

from tests.ptx.machine import Grid, Machine
from tests.ptx.memory import AccessError, Memory, Segment, Traffic
from tests.ptx.parser import Program, parse

_device_indices = itertools.count(1)
_texts: dict[str, str] = {}
_HUGE = 1 << 26
_MAX_GRID = (2**31 - 1, 65535, 65535)


@dataclass(frozen=True)
class Launch:
    """What the driver was asked to run; ``arguments`` are the integers and addresses that a CUDA graph would keep."""

    name: str
    grid: tuple[int, int, int]
    kernel: str
    num_warps: int
    arguments: tuple[tuple[str, int], ...]


class _Utils:
    """The part of the driver that loads binaries; here it only hands out names."""

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[str, str, int, int, int]:
        return name, name, 0, 0, 1024

    def unload_module(self, module: str) -> None:
        pass

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32, "max_num_regs": 65536}


class _Driver:
    """The interface that ``JITFunction.run`` and ``CompiledKernel`` use."""

    def __init__(self, device: PtxDevice) -> None:
        self.utils = _Utils()
        # Triton keeps one cache of kernels per device index: a fresh index starts without any.
        self._index = next(_device_indices)
        self._device = device

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        return _Launcher(self._device, source, metadata)

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._device.arch, 32)

    def get_current_device(self) -> int:
        return self._index

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_capability(self, device: int) -> tuple[int, int]:
        return divmod(self._device.arch, 10)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


class _Launcher:
    """What Triton calls to launch one compiled kernel."""

    def __init__(self, device: PtxDevice, source: Any, metadata: Any) -> None:
        self._device, self._metadata = device, metadata
        self._signature = list(source.signature.items())

    def __call__(self, x: int, y: int, z: int, stream: int, function: str, packed: Any, *rest: Any) -> None:
        _launch_metadata, _enter, _exit, *arguments = rest
        named = zip(self._signature, arguments, strict=True)
        passed = [(name, kind, value) for (name, kind), value in named if kind != "constexpr"]
        self._device.launch(self._metadata, (x, y, z), passed)


@lru_cache(maxsize=64)
def _program(text: str) -> Program:
    return parse(text)


@dataclass
class PtxDevice:
    """Records launches, and executes them when ``execute`` is set.

    Args:
        arch: compute capability times ten.
        execute: run the PTX; otherwise only record.
        select_blocks: for huge grids, which linear blocks to run.
        output_arguments: kernel arguments whose tensors are outputs even where they were not declared.
    """

    arch: int = 90
    execute: bool = True
    select_blocks: Callable[[tuple[int, int, int]], Sequence[int]] | None = None
    output_arguments: Sequence[str] = ()
    launches: list[Launch] = field(default_factory=list)
    compiled: list[str] = field(default_factory=list)
    memory: Memory = field(default_factory=Memory)
    _expected: list[tuple[Sequence[torch.Tensor], Segment]] = field(default_factory=list)
    _kept: list[torch.Tensor] = field(default_factory=list)

    @contextmanager
    def active(self) -> Iterator[PtxDevice]:
        """Make this the device that Triton compiles for and launches on."""
        config, knobs = triton.runtime.driver, triton.knobs.compilation
        before, listener = config._active, knobs.listener
        config.set_active(_Driver(self))
        knobs.listener = self._note_compilation
        try:
            yield self
        finally:
            config._active = before
            knobs.listener = listener

    def _note_compilation(self, *, metadata: dict[str, Any], metadata_group: dict[str, str], **_: Any) -> None:
        path = next(path for name, path in metadata_group.items() if name.endswith(".ptx"))
        _texts[metadata["hash"]] = Path(path).read_text()
        self.compiled.append(metadata["hash"])

    def output(self, tensor: torch.Tensor) -> torch.Tensor:
        """Declare a tensor that the kernel writes; its old values are unreadable."""
        segment = self._register(tensor, "output", writable=True)
        # Marking a huge tensor would touch every page of it.
        if tensor.numel() < _HUGE:
            _mark_elements(segment.unreadable, tensor, segment)
            _poison(tensor)
        self._expected.append(([tensor], segment))
        return tensor

    def in_place(self, tensor: torch.Tensor, written: Sequence[torch.Tensor] | None = None) -> torch.Tensor:
        """Declare a tensor that the kernel reads and writes, each thread its own elements; or only parts of it."""
        segment = self._register(tensor, "in-place tensor", writable=True, in_place=True)
        self._expected.append(([tensor] if written is None else written, segment))
        return tensor

    def input(self, tensor: torch.Tensor) -> torch.Tensor:
        """Declare a tensor that the kernel only reads (arguments are declared by themselves)."""
        self._register(tensor, "input", writable=False)
        return tensor

    def traffic(self, tensor: torch.Tensor) -> Traffic:
        """Bytes that the launches so far requested from and sent to a tensor."""
        segment = self.memory.find(*_extent(tensor))
        return segment.traffic if segment is not None else Traffic()

    def distinct_loaded(self, tensor: torch.Tensor) -> int:
        """Bytes of a tensor that the launches so far read at least once."""
        segment = self.memory.find(*_extent(tensor))
        return segment.distinct_loaded if segment is not None else 0

    def check_written_once(self) -> None:
        """Every element of every output was written, and once; nothing else was."""
        for parts, segment in self._expected:
            expected = np.zeros_like(segment.writes)
            for tensor in parts:
                _mark_elements(expected, tensor, segment)
            if not np.array_equal(segment.writes, expected):
                missing = int(((segment.writes == 0) & (expected == 1)).sum())
                extra = int(segment.writes.astype(np.int64).sum()) - int(expected.sum()) + missing
                raise AccessError(f"{segment.name}: {missing} units missing, {extra} extra")

    def launch(self, metadata: Any, grid: tuple[int, int, int], arguments: list[tuple[str, str, Any]]) -> None:
        """Take a launch from Triton; each argument has a name and a type."""
        if min(grid) <= 0 or any(size > limit for size, limit in zip(grid, _MAX_GRID, strict=True)):
            raise AccessError(f"no GPU accepts the grid {grid} (limits {_MAX_GRID})")
        values = tuple((name, _bits(kind, value)) for name, kind, value in arguments)
        self.launches.append(Launch(metadata.name, grid, metadata.hash, metadata.num_warps, values))
        if self.execute:
            bits = [self._bind(*argument) for argument in arguments]
            program = _program(_texts[metadata.hash])
            blocks = np.asarray(self.select_blocks(grid)) if self.select_blocks else None
            scratch = [0] * (len(program.parameters) - len(bits))
            Machine(program, self.memory, metadata.shared).run(bits + scratch, Grid(grid, blocks))

    def _bind(self, name: str, kind: str, value: Any) -> int:
        """An argument's bits; a tensor that is new becomes memory."""
        is_memory = kind.startswith("*") and value is not None and value.numel() > 0
        if is_memory and self.memory.find(*_extent(value)) is None:
            if name in self.output_arguments:
                self.output(value)
            else:
                self._register(value, f"{name} of shape {list(value.shape)}", writable=False)
        return _bits(kind, value)

    def _register(self, tensor: torch.Tensor, name: str, *, writable: bool, in_place: bool = False) -> Segment:
        # Memory that a launch has seen must not be given to another tensor while this device lives.
        self._kept.append(tensor)
        start, end = _extent(tensor)
        unit = min(tensor.element_size(), 4)
        segment = Segment(name, start, end - start, unit=unit, writable=writable, in_place=in_place)
        if end - start != tensor.numel() * tensor.element_size():
            segment.unreadable[:] = True
            _mark_elements(segment.unreadable, tensor, segment, value=False)
        return self.memory.add(segment)


def _bits(kind: str, value: Any) -> int:
    """What the driver hands to the GPU for an argument."""
    if kind.startswith("*"):
        return 0 if value is None else int(value.data_ptr())
    if kind[0] not in "iu":
        raise TypeError(f"a scalar argument of type {kind} is not expected: coefficients belong into the table")
    return int(value) & (2**64 - 1)


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """First byte of a strided tensor, and the first byte after it."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    return start, start + (last + 1) * tensor.element_size() if tensor.numel() else start


def _mark_elements(shadow: np.ndarray, tensor: torch.Tensor, segment: Segment, value: bool = True) -> None:
    """Set the shadow's units that belong to elements of the tensor."""
    units = tensor.element_size() // segment.unit
    view = torch.from_numpy(shadow.view(np.uint8))
    strides = [stride * units for stride in tensor.stride()]
    offset = (tensor.data_ptr() - segment.start) // segment.unit
    view.as_strided([*tensor.shape, units], [*strides, 1], offset).fill_(int(value))


def _poison(tensor: torch.Tensor) -> None:
    if tensor.is_floating_point():
        tensor.fill_(float("nan"))
    else:
        tensor.fill_(torch.iinfo(tensor.dtype).min + 1)
