"""What every kernel must keep to on every architecture: registers, no spill, nothing shared."""

from __future__ import annotations

from fastddpm.diagnostics import compile_offline as offline
from fastddpm.diagnostics.variants import Variant


def check_registers(variant: Variant, arch: str, most: int = 128) -> None:
    """Compile a variant, and look."""
    used = offline.resources(offline.compile_launch(variant.launch, arch))
    assert (used.spills, used.stack, used.shared) == (0, 0, 0)
    assert used.registers <= most
