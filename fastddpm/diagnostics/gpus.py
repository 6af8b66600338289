"""Figures of named GPUs, from the makers' data sheets, and the roofline: what they allow a kernel, per element.

Clock: the boost clock; data centre parts are quoted by their peak float32 rate, which fixes it (2 x lanes x clock).
Issue rate: an SM's four schedulers issue one warp instruction each per clock, so 128 lanes (CUDA C++ Programming Guide,
"Hardware Multithreading" of each compute capability). Integer rate: its table "Throughput of Native Arithmetic
Instructions", rows 32-bit integer add, shift, logic and 32-bit integer multiply: 64 lanes each (the unified cores of
compute capability 12.0 do better on the first; 64 is the cautious figure there).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """A GPU as its data sheet describes it.

    Attributes:
        name: how people call it.
        arch: compilation target.
        bandwidth: bytes per second to and from DRAM.
        processors: streaming multiprocessors.
        clock: boost clock in Hz.
        l2: bytes of L2 cache.
        source: where the figures come from.
        issue_lanes: lanes that a processor can issue per clock.
        integer_lanes: lanes of integer arithmetic and logic per clock, and as many again of integer multiply.
    """

    name: str
    arch: str
    bandwidth: float
    processors: int
    clock: float
    l2: int
    source: str
    issue_lanes: int = 128
    integer_lanes: int = 64

    @property
    def issue_rate(self) -> float:
        """Thread instructions per second."""
        return self.processors * self.issue_lanes * self.clock

    @property
    def integer_rate(self) -> float:
        """Thread integer instructions per second, of each of the two kinds."""
        return self.processors * self.integer_lanes * self.clock


_MB = 1 << 20

# Name, architecture, bandwidth, processors, clock, L2; source.
GPUS = (
    Gpu("T4", "sm_75", 320e9, 40, 1.59e9, 4 * _MB,
        "NVIDIA T4 data sheet (320 GB/s); NVIDIA Turing GPU architecture white paper (TU104: 40 SMs, 4 MB L2)"),
    Gpu("A100 SXM 80GB", "sm_80", 2039e9, 108, 1.41e9, 40 * _MB,
        "NVIDIA A100 data sheet (2,039 GB/s); NVIDIA A100 white paper (108 SMs, 1,410 MHz, 40 MB L2)"),
    Gpu("H100 SXM", "sm_90", 3.35e12, 132, 1.98e9, 50 * _MB,
        "NVIDIA H100 data sheet (3.35 TB/s, 67 TFLOPS FP32); NVIDIA H100 white paper (132 SMs, 50 MB L2)"),
    Gpu("H200 SXM", "sm_90", 4.8e12, 132, 1.98e9, 50 * _MB,
        "NVIDIA H200 data sheet (4.8 TB/s, 67 TFLOPS FP32); NVIDIA H100 white paper (132 SMs, 50 MB L2)"),
    Gpu("B200", "sm_100", 8e12, 148, 1.98e9, 126 * _MB,
        "NVIDIA HGX B200 data sheet (8 TB/s, 75 TFLOPS FP32); SMs and L2 as the device reports them"),
    Gpu("RTX 5090", "sm_120", 1792e9, 170, 2.407e9, 96 * _MB,
        "NVIDIA RTX Blackwell white paper (1,792 GB/s, 170 SMs, 2,407 MHz, 98,304 KB L2)"),
)  # fmt: skip


def default_gpu(arch: str) -> Gpu | None:
    """The GPU that stands for an architecture, None where no data sheet is on file."""
    return next((gpu for gpu in GPUS if gpu.arch == arch), None)


def find_gpu(name: str) -> Gpu:
    """Look a GPU up by name, whatever the case.

    Raises:
        ValueError: if no data sheet of that name is on file.
    """
    for gpu in GPUS:
        if gpu.name.lower() == name.lower():
            return gpu
    raise ValueError(f"no data sheet on file for the GPU {name!r}; known: {', '.join(gpu.name for gpu in GPUS)}")


@dataclass(frozen=True)
class Roofline:
    """Lower bounds of the time per element, in seconds, and what follows from them.

    Attributes:
        dram: bytes per element over the DRAM bandwidth.
        issue: executed instructions per element over the issue rate.
        integer: the larger of integer arithmetic and integer multiply over their rates.
        l2_elements: elements up to which everything the kernel touches fits into L2, so that DRAM is not the bound.
    """

    dram: float
    issue: float
    integer: float
    l2_elements: int

    @property
    def binds(self) -> str:
        """The roof that binds once the tensors have left L2: "DRAM", "issue" or "integer"."""
        return max((self.dram, "DRAM"), (self.issue, "issue"), (self.integer, "integer"))[1]

    @property
    def compute_share(self) -> float:
        """Time of the slower of issue and integer as a share of DRAM's: below 1, bandwidth binds."""
        return max(self.issue, self.integer) / self.dram


def roofline(gpu: Gpu, bytes_per_element: float, executed: float, classes: Mapping[str, float]) -> Roofline:
    """Place a kernel under a GPU's roofs.

    Args:
        gpu: data-sheet figures.
        bytes_per_element: to and from the tensors that scale with the batch; coefficients stay in L1.
        executed: instructions per element.
        classes: the same by class, see ``sass.instruction_class``.
    """
    integer = max(classes.get("integer", 0.0), classes.get("integer multiply", 0.0))
    return Roofline(
        dram=bytes_per_element / gpu.bandwidth,
        issue=executed / gpu.issue_rate,
        integer=integer / gpu.integer_rate,
        l2_elements=int(gpu.l2 // bytes_per_element),
    )
