"""What a kernel's bytes and instructions per element allow on a named GPU: a roofline with three roofs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fastddpm.diagnostics.gpus import Gpu


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
    def elements_per_second(self) -> float:
        """The most that the binding roof allows."""
        return 1.0 / max(self.dram, self.issue, self.integer)

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
