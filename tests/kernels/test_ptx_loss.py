"""The compiled sm_90 code of the training loss, executed on the CPU: the twin's bits, and memory as promised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from fastddpm import Schedule
from fastddpm.diagnostics.step_cases import arrange, make_counter
from fastddpm.noise.v1 import Counter
from fastddpm.ops import twins as step
from fastddpm.ops.ddpm_loss import scaled_residual_kernel, squares_kernel
from fastddpm.tables.table import loss_rows
from tests.ptx.device import PtxDevice
from tests.ptx.steps import OUTPUTS, assert_same_bits, spiced

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@dataclass(frozen=True)
class LossCase:
    """One call of ddpm_loss; ``m`` is the type of the network's output and ``layout`` how it lies in memory."""

    shape: tuple[int, ...]
    prediction: str = "epsilon"
    m: torch.dtype = FP32
    x: torch.dtype = FP32
    layout: str = "contiguous"
    learned: bool = False
    shared: bool = False

    def __str__(self) -> str:
        parts = ["x".join(map(str, self.shape)), self.prediction, str(self.m).removeprefix("torch."), self.layout]
        return "-".join([*parts, *(name for name in ("learned", "shared") if getattr(self, name))])


# A warp's sum over one, two and more samples; a sample of several tiles; a last group that is cut short; each target,
# type and layout.
CASES = [
    LossCase((1, 3, 32, 32)),
    LossCase((1, 3, 32, 32), "v", BF16, BF16, "channels_last", learned=True),
    LossCase((2, 3, 16, 16), "x_0", FP16, layout="channels_last", shared=True),
    LossCase((2, 3, 8, 8), "v", layout="shifted"),
    LossCase((3, 3, 11, 31), "v", FP16, FP16, "channels_last", learned=True),
    LossCase((3, 3, 8, 8), "v", learned=True),
    LossCase((130, 2), "v"),
    LossCase((70, 1), "epsilon", BF16),
    LossCase((5, 5), "x_0"),
    LossCase((3, 76), "epsilon", shared=True),
    LossCase((2, 5, 5, 41), "epsilon", layout="channels_last"),
]


def operands(case: LossCase) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Counter | None, bool]:
    generator = torch.Generator().manual_seed(sum(case.shape))
    batch, channels, *plane = case.shape
    m = torch.randn(batch, channels * (1 + case.learned), *plane, generator=generator).to(case.m)
    x_0 = None if case.prediction == "epsilon" else torch.rand(case.shape, generator=generator).to(case.x)
    noise = None if case.prediction == "x_0" else make_counter(batch, case.shared, generator, stream=2)
    row = torch.randint(0, 1000, (1 if case.shared else batch,), generator=generator)
    return arrange(m, case.layout), x_0, loss_rows(Schedule.linear(), case.prediction), row, noise, case.learned


def squares(m: Tensor, *arguments: Any) -> Tensor:
    sums = torch.empty(len(m), dtype=torch.float64)
    squares_kernel((sums,), m, *arguments)
    return sums


@pytest.mark.parametrize("case", CASES, ids=str)
def test_loss_is_within_1e_6_of_float64_and_reads_each_element_once(case: LossCase) -> None:
    arguments = operands(case)
    m, x_0 = arguments[:2]
    device = PtxDevice(output_arguments=OUTPUTS)
    with device.active():
        sums = squares(*arguments)
    device.check_written_once()
    expected = step.residual(*arguments).double().square().flatten(1).sum(dim=1)
    assert sums.tolist() == pytest.approx(expected.tolist(), rel=1e-6)
    for tensor in (m, x_0):
        if tensor is not None:
            elements = tensor.numel() // (1 + (case.learned and tensor is m))
            assert device.traffic(tensor).loaded == elements * tensor.element_size()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradient_has_the_twins_bits(case: LossCase) -> None:
    arguments = operands(case)
    m = arguments[0]
    if case.layout == "contiguous" and m.dtype == FP32:
        spiced(m, torch.Generator().manual_seed(1))
    dense = m if case.layout == "channels_last" else m.contiguous()
    scale = torch.randn(len(m), generator=torch.Generator().manual_seed(2))
    twin, kernel = (torch.zeros_like(dense).chunk(1 + case.learned, dim=1)[0] for _ in range(2))
    step.fill(step.scaled_residual, (twin,), (*arguments, scale), False)
    device = PtxDevice(output_arguments=OUTPUTS)
    with device.active():
        scaled_residual_kernel((kernel,), *arguments, scale)
    device.check_written_once()
    assert_same_bits(kernel, twin)
    assert device.traffic(kernel).stored == kernel.numel() * kernel.element_size()


def test_sums_are_the_same_alone_and_in_a_batch() -> None:
    m, x_0, rows, row, noise, learned = operands(LossCase((37, 60), "v"))
    assert noise is not None
    assert x_0 is not None
    device = PtxDevice(output_arguments=OUTPUTS)
    with device.active():
        together = squares(m, x_0, rows, row, noise, learned)
        for k in (0, 36):
            one = slice(k, k + 1)
            alone = Counter(noise.seed[one], noise.sample_id[one], noise.step, noise.stream)
            sums = squares(m[one].clone(), x_0[one].clone(), rows, row[one], alone, learned)
            assert torch.equal(sums, together[one])


@pytest.mark.parametrize("arch", [100])
def test_code_for_other_architectures_has_the_same_bits(arch: int) -> None:
    arguments = operands(LossCase((2, 3, 8, 8), "v", BF16, BF16, "channels_last", learned=True))
    sums = []
    for target in (90, arch):
        device = PtxDevice(target, output_arguments=OUTPUTS)
        with device.active():
            sums.append(squares(*arguments))
    assert torch.equal(*sums)


def test_an_empty_batch_launches_nothing() -> None:
    device, none = PtxDevice(), torch.zeros(0, dtype=torch.int64)
    empty, rows = torch.empty(0, 12), torch.ones(1, 3)
    with device.active():
        assert squares(empty, empty, rows, none, None, False).shape == (0,)
        scaled_residual_kernel((empty,), empty, empty, rows, none, None, False, torch.empty(0))
    assert device.launches == []
