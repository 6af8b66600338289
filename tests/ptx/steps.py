"""Run calls of the fused operations by the compiled kernels and by their twins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastddpm.diagnostics.step_cases import StepCase, inputs
from fastddpm.ops import twins
from fastddpm.ops.p_sample import p_sample_kernel
from fastddpm.ops.twins import fill
from tests.ptx.device import PtxDevice

OUTPUTS = ("out_ptr", "x0_out_ptr", "low_ptr", "eps_out_ptr")


def spiced(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Strew values that are easily lost: NaN, both infinities, both zeros, the smallest and the largest."""
    special = [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-45, -1e-39, 6e-8, 65504.0, 3e38]
    flat = tensor.view(-1)
    if flat.numel() >= 64:
        where = torch.randperm(flat.numel(), generator=generator)[: len(special)]
        flat[where] = torch.tensor(special)
    return tensor


@dataclass
class StepRun:
    """What a case gave: by the compiled kernel, and by the twin."""

    device: PtxDevice
    x_t: Tensor
    m: Tensor
    kernel: dict[str, Tensor | None]
    twin: dict[str, Tensor | None]


def run_step(case: StepCase, arch: int = 90, seed: int = 0) -> StepRun:
    """Run a case on the PTX device and by the twin."""
    twin, kernel = inputs(case, seed, change=spiced), inputs(case, seed, change=spiced)
    fill(twins.p_sample, _targets(twin), _arguments(twin, case), False)
    device = PtxDevice(arch, output_arguments=OUTPUTS)
    if case.in_place:
        device.in_place(kernel["x_t"])
    ring = kernel["history"]
    if ring is not None:
        row = kernel["row"].expand(len(kernel["x_t"])).tolist()
        device.in_place(ring, written=[ring[r % len(ring), b] for b, r in enumerate(row)])
    with device.active():
        p_sample_kernel(_targets(kernel), *_arguments(kernel, case))
    return StepRun(device, kernel["x_t"], kernel["m"], _written(kernel), _written(twin))


def _arguments(kw: dict[str, Any], case: StepCase) -> tuple[Any, ...]:
    return (*(kw[name] for name in ("x_t", "m", "rows", "row", "noise")), case.flags, kw["history"])


def _targets(kw: dict[str, Any]) -> tuple[Tensor | None, ...]:
    return kw["out"], kw["x0_out"], kw["low_out"]


def _written(kw: dict[str, Any]) -> dict[str, Tensor | None]:
    return {name: kw[name] for name in ("out", "x0_out", "low_out", "history")}


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    """Equal bit for bit, any NaN equal to any NaN (payloads and signs of NaN differ between processors)."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    nan = expected.isnan()
    assert torch.equal(actual.isnan(), nan)
    integer = torch.int32 if actual.element_size() == 4 else torch.int16
    bits = [torch.where(nan, 0, t.contiguous().view(integer)) for t in (actual, expected)]
    wrong = int((bits[0] != bits[1]).sum())
    assert wrong == 0, (
        f"{wrong} of {actual.numel()} elements differ, by up to {(actual - expected).nan_to_num().abs().max()}"
    )


def assert_twins_bits(run: StepRun) -> None:
    """Same bits in every output; every element of each written, and once; nothing launched in vain."""
    run.device.check_written_once()
    for name, expected in run.twin.items():
        actual = run.kernel[name]
        assert (actual is None) == (expected is None)
        if actual is not None and expected is not None:
            assert_same_bits(actual, expected)
    assert len(run.device.launches) == 1
