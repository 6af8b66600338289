"""Cases for the fused operations: tensors of every kind, run by the compiled kernels and by their twins."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fastddpm.noise.v1 import Counter
from fastddpm.ops import triton_backend, twins
from fastddpm.ops.twins import Flags, fill
from tests.ptx.device import PtxDevice

OUTPUTS = ("out_ptr", "x0_out_ptr", "low_ptr", "eps_out_ptr")
ROWS, TABLE_LENGTH = 14, 6


@dataclass(frozen=True)
class StepCase:
    """One call of p_sample.

    Attributes:
        shape: of x_t.
        x, m: storage types of the state and of the network's output.
        flags: what the step computes.
        noise: "counter", "given" or "none".
        z: storage type of given noise.
        x0_out, low_out: storage types of the further outputs, None where they are not asked for.
        layout: of x_t: "contiguous", "channels_last", "expanded" along the batch, or "shifted" by one element.
        m_layout, low_layout: "contiguous", "channels_last" or "shifted".
        shared: one row, seed and id for all samples instead of one each.
        in_place: x_prev goes where x_t was.
    """

    shape: tuple[int, ...] = (2, 3, 32, 32)
    x: torch.dtype = torch.float32
    m: torch.dtype = torch.float32
    flags: Flags = field(default_factory=Flags)
    noise: str = "counter"
    z: torch.dtype = torch.float32
    x0_out: torch.dtype | None = None
    low_out: torch.dtype | None = None
    layout: str = "contiguous"
    m_layout: str = "contiguous"
    low_layout: str = "contiguous"
    shared: bool = False
    in_place: bool = False

    def __str__(self) -> str:
        """Name what differs from the default."""
        default = StepCase()
        parts = ["x".join(map(str, self.shape))]
        parts += [name for name, value in self.flags._asdict().items() if value]
        for name in ("x", "m", "noise", "z", "x0_out", "low_out", "layout", "m_layout", "low_layout"):
            value = getattr(self, name)
            if value != getattr(default, name):
                parts.append(f"{name}={str(value).removeprefix('torch.')}")
        parts += [name for name in ("shared", "in_place") if getattr(self, name)]
        return "-".join(parts)

    def but(self, **changes: Any) -> StepCase:
        return replace(self, **changes)


def arrange(tensor: Tensor, layout: str) -> Tensor:
    """The same values in another memory layout."""
    if layout == "channels_last":
        return tensor.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "shifted":
        storage = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
        return storage[1:].view(tensor.shape).copy_(tensor)
    if layout == "expanded":
        return tensor[:1].expand(tensor.shape)
    return tensor.contiguous()


def spiced(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Strew values that are easily lost: NaN, both infinities, both zeros, the smallest and the largest."""
    special = [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-45, -1e-39, 6e-8, 65504.0, 3e38]
    flat = tensor.view(-1)
    if flat.numel() >= 64:
        where = torch.randperm(flat.numel(), generator=generator)[: len(special)]
        flat[where] = torch.tensor(special)
    return tensor


def make_counter(batch: int, shared: bool, generator: torch.Generator, stream: int = 1) -> Counter:
    """Seeds over all 64 bits and ids over all 32, with the ends of both ranges."""
    count = 1 if shared else batch
    seed = torch.randint(-(2**63), 2**63 - 1, (count,), generator=generator)
    ids = torch.randint(0, 2**32, (count,), generator=generator)
    seed[0], ids[-1] = -(2**63), 2**32 - 1
    step = torch.randint(0, 2**32, (1,), generator=generator)
    return Counter(seed, ids, step, stream)


def make_rows(batch: int, shared: bool, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A table whose last row has sigma = 0, and the samples' rows, which visit it."""
    rows = torch.randn(TABLE_LENGTH, ROWS, generator=generator)
    rows[:, 2], rows[:, 3] = -0.75, 1.25
    rows[:, 8].abs_()
    rows[-1, 8] = 0.0
    row = torch.randint(0, TABLE_LENGTH, (1 if shared else batch,), generator=generator)
    if not shared and batch > 1:
        row[-1] = TABLE_LENGTH - 1
    return rows, row


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
    generator = torch.Generator().manual_seed(seed)
    batch, channels, *plane = case.shape
    m_shape = (batch * (1 + case.flags.guided), channels * (1 + case.flags.learned), *plane)
    x_t = arrange(spiced(torch.randn(case.shape, generator=generator), generator).to(case.x), case.layout)
    m = arrange(spiced(torch.randn(m_shape, generator=generator), generator).to(case.m), case.m_layout)
    x0_prev = torch.randn(case.shape, generator=generator).to(case.x) if case.flags.use_prev else None
    rows, row = make_rows(batch, case.shared, generator)
    noise: Counter | Tensor | None = None
    if case.noise == "counter":
        noise = make_counter(batch, case.shared, generator)
    elif case.noise == "given":
        noise = torch.randn(case.shape, generator=generator).to(case.z)
    twin = _outputs(case, x_t.clone())
    kernel = _outputs(case, x_t)
    arguments = (m, rows, row, noise, case.flags, () if x0_prev is None else (x0_prev,))
    fill(twins.p_sample, tuple(twin.values()), (x_t.clone(), *arguments), False)
    device = PtxDevice(arch, output_arguments=OUTPUTS)
    if case.in_place:
        device.in_place(x_t)
    with device.active():
        triton_backend.p_sample(tuple(kernel.values()), x_t, *arguments)
    return StepRun(device, x_t, m, kernel, twin)


def _outputs(case: StepCase, x_t: Tensor) -> dict[str, Tensor | None]:
    new = torch.empty(case.shape, dtype=case.x)
    low = None if case.low_out is None else arrange(torch.empty(case.shape, dtype=case.low_out), case.low_layout)
    x0 = None if case.x0_out is None else torch.empty(case.shape, dtype=case.x0_out)
    return {"out": x_t if case.in_place else new, "x0_out": x0, "low_out": low}


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
