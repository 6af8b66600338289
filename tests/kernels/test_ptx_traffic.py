"""What the compiled sm_90 code moves and where: bytes per element, grids, in-place updates, huge tensors."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from fastddpm.kernels import launch as kernel_launch
from fastddpm.kernels import p_sample as kernel_module

from fastddpm.diagnostics.step_cases import StepCase, make_counter, make_rows, step_case
from fastddpm.diagnostics.variants import p_sample_variant
from fastddpm.noise import v1 as noise
from fastddpm.noise.v1 import Counter
from fastddpm.ops import twins as step
from fastddpm.ops.p_sample import p_sample_kernel
from fastddpm.ops.q_sample import q_sample_kernel
from fastddpm.ops.twins import Flags
from tests.ptx.device import PtxDevice
from tests.ptx.memory import sparse_zeros
from tests.ptx.steps import OUTPUTS, assert_same_bits, assert_twins_bits, run_step

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CLIP = Flags(clip=True)
IMAGE = step_case("clip", shape=(2, 3, 32, 32))


@pytest.mark.parametrize(
    ("case", "per_element"),
    [
        (IMAGE, 12),
        (IMAGE.but(m=BF16), 10),
        (IMAGE.but(low_out=BF16), 14),
        (IMAGE.but(m=BF16, low_out=BF16), 12),
        (IMAGE.but(m_layout="channels_last"), 12),
        (IMAGE.but(m=BF16, m_layout="channels_last", low_out=BF16, low_layout="channels_last"), 12),
        (IMAGE.but(x=BF16, m=BF16), 6),
        (IMAGE.but(noise="given"), 16),
        (IMAGE.but(clip=False, guided=True), 16),
        (IMAGE.but(clip=False, learned=True), 16),
        (IMAGE.but(clip=False, learned=True, guided=True), 20),
        (IMAGE.but(x0_out=FP32), 16),
        (IMAGE.but(in_place=True), 12),
        (IMAGE.but(history=1), 20),
        (IMAGE.but(history=2), 24),
        (IMAGE.but(history=3), 28),
    ],
    ids=str,
)
def test_p_sample_moves_each_element_once(case: StepCase, per_element: int) -> None:
    run = run_step(case)
    assert_twins_bits(run)
    small = ("rows", "row", "seed", "id", "step")
    big = [s for s in run.device.memory.segments if s.name.split("_ptr")[0] not in small]
    assert sum(s.traffic.loaded + s.traffic.stored for s in big) == per_element * run.x_t.numel()
    assert all(s.traffic.loaded in (0, s.distinct_loaded) for s in big)


@pytest.mark.parametrize(("return_eps", "per_element"), [(False, 8), (True, 12)])
def test_q_sample_moves_each_element_once(return_eps: bool, per_element: int) -> None:
    x_0, rows = torch.randn(2, 3072), torch.randn(3, 2)
    counter = make_counter(2, False, torch.Generator().manual_seed(0))
    out, eps = torch.empty_like(x_0), torch.empty_like(x_0)
    device = PtxDevice(output_arguments=OUTPUTS)
    with device.active():
        q_sample_kernel((out, eps if return_eps else None), x_0, rows, torch.tensor([1]), counter)
    moved = device.traffic(x_0).loaded + device.traffic(out).stored + device.traffic(eps).stored
    assert moved == per_element * x_0.numel()


def test_q_sample_writes_only_what_is_not_kept() -> None:
    """A masked step: 4 bytes of known data and 1 of the mask read, 4 written where data are known, nothing else."""
    x_0, rows = torch.randn(2, 3072), torch.randn(3, 2)
    counter = make_counter(2, False, torch.Generator().manual_seed(0))
    keep, out = torch.rand(2, 3072) < 0.4, torch.randn(2, 3072)
    device = PtxDevice(output_arguments=OUTPUTS)
    with device.active():
        q_sample_kernel((out, None), x_0, rows, torch.tensor([1]), counter, keep, out)
    assert device.traffic(x_0).loaded == 4 * x_0.numel()
    assert device.traffic(keep).loaded == keep.numel()
    assert device.traffic(out).stored == 4 * int((~keep).sum())
    assert device.traffic(out).loaded == 0
    # The device's outputs begin as NaN, whatever they hold here.
    assert out[keep].isnan().all()
    assert_same_bits(out[~keep], step.q_sample(x_0, rows, torch.tensor([1]), counter)[0][~keep])


@pytest.mark.parametrize(
    ("case", "widths"),
    [
        (IMAGE, {"x_t": 16, "m": 16, "out": 16}),
        (IMAGE.but(shape=(2, 1, 6, 34)), {"x_t": 16, "m": 16, "out": 16}),
        (IMAGE.but(x=BF16, m=FP16), {"x_t": 8, "m": 8, "out": 8}),
        (IMAGE.but(m_layout="channels_last"), {"x_t": 16, "m": 4, "out": 16}),
        (IMAGE.but(layout="shifted"), {"x_t": 4, "m": 4, "out": 4}),
        (IMAGE.but(shape=(2, 1, 31, 33)), {"x_t": 4, "m": 4, "out": 4}),
    ],
    ids=str,
)
def test_accesses_have_the_width_that_size_and_alignment_allow(case: StepCase, widths: dict[str, int]) -> None:
    run = run_step(case)
    out = run.kernel["out"]
    assert out is not None
    assert set(run.device.traffic(run.x_t).load_widths) == {widths["x_t"]}
    assert set(run.device.traffic(run.m).load_widths) == {widths["m"]}
    assert set(run.device.traffic(out).store_widths) == {widths["out"]}


@pytest.mark.parametrize(
    "case",
    [
        IMAGE.but(in_place=True),
        IMAGE.but(in_place=True, shape=(3, 3, 8, 8)),
        IMAGE.but(in_place=True, shape=(70, 1, 2, 1)),
        IMAGE.but(in_place=True, shape=(2, 3, 11, 31), x=BF16),
        IMAGE.but(in_place=True, m_layout="channels_last", low_out=BF16, low_layout="channels_last"),
        IMAGE.but(in_place=True, shape=(2, 3, 7, 7), m_layout="channels_last"),
    ],
    ids=str,
)
def test_p_sample_in_place_is_free_of_races(case: StepCase) -> None:
    assert_twins_bits(run_step(case))


def test_an_empty_batch_launches_nothing() -> None:
    device = PtxDevice()
    x, none = torch.empty(0, 3, 8, 8), torch.zeros(0, dtype=torch.int64)
    with device.active():
        p_sample_kernel((x.clone(), None, None), x, x, torch.ones(1, 14), none, None, Flags(), None)
    assert device.launches == []


def test_100_000_points_fill_their_lanes_and_fit_the_grid() -> None:
    run = run_step(IMAGE.but(shape=(100_000, 2)))
    assert_twins_bits(run)
    (launch,) = run.device.launches
    rows = launch.grid[0] * launch.grid[1] * launch.grid[2] * kernel_launch.TILE
    assert 100_000 <= rows < 100_000 + kernel_launch.TILE
    assert launch.grid[1:] == (1, 1)


@pytest.mark.parametrize(
    ("case", "repeat"),
    [
        (IMAGE.but(in_place=True), 3),
        (IMAGE.but(shape=(17, 3, 8, 8)), 1),
        (IMAGE.but(shape=(2, 1, 45, 45), m=BF16), 2),
    ],
    ids=str,
)
def test_programs_of_a_large_batch_walk_several_tiles(
    case: StepCase, repeat: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a sample that fills tiles, and of one with a ragged end; a tile that samples share is walked alone."""
    monkeypatch.setattr(kernel_launch, "_ENOUGH_PROGRAMS", 1)
    monkeypatch.setattr(kernel_module, "repeats", kernel_launch.repeats.__wrapped__)
    run = run_step(case)
    assert_twins_bits(run)
    assert dict(run.device.launches[0].arguments)["repeat"] == repeat


@pytest.mark.parametrize("case", [IMAGE, IMAGE.but(m=BF16, m_layout="channels_last", low_out=BF16)], ids=str)
def test_images_of_256_by_256_have_the_twins_bits(case: StepCase) -> None:
    assert_twins_bits(run_step(case.but(shape=(2, 3, 256, 256))))


GROUPS = [1, 2, 3, 15, 16, 17, 48, 192, 255, 256, 257, 768, 49152, 2**24 + 1, 2**29, 2**31 + 5, 2**32 - 256, 2**32]


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("batch", [1, 7, 64, 100_000])
def test_the_grid_covers_every_group_wastes_few_lanes_and_never_wraps(batch: int, groups: int) -> None:
    block = kernel_launch.block_groups(groups)
    repeat = kernel_launch.repeats(batch, groups)
    x, y, z = kernel_launch.launch_grid(batch, groups, repeat)
    assert x * (kernel_launch.TILE // block) >= batch
    assert x <= 2**31 - 1
    assert max(y, z) <= 65535
    assert groups <= y * z * block * repeat <= 2**32
    assert y * z * block * repeat <= 2 * groups


def filled(n: int, windows: list[slice], dtype: torch.dtype = FP32, seed: int = 0) -> torch.Tensor:
    """A huge tensor [1, n] of which only the windows hold anything, and take memory."""
    itemsize = torch.empty(0, dtype=dtype).element_size()
    kind = {2: "int16", 4: "int32"}[itemsize]
    tensor = torch.from_numpy(sparse_zeros(n, kind)).view(dtype)
    generator = torch.Generator().manual_seed(seed)
    for window in windows:
        tensor[window] = torch.randn(window.stop - window.start, generator=generator).to(dtype)
    return tensor


def noise_window(counter: Counter, window: slice) -> torch.Tensor:
    """Normals ``window`` of a sample, which starts at a whole group."""
    g = torch.arange(window.start // 4, -(-window.stop // 4), dtype=torch.int64)[None]
    words = (counter.seed[:, None], counter.sample_id[:, None], counter.step[:, None])
    return noise._normals_block(*words, counter.stream, g)[:, : window.stop - window.start]


@pytest.mark.parametrize("n", [2**31 + 4108, 2**31 + 2051, 2**33 + 8, 2**34], ids=["vector", "scalar", "8G", "16G"])
def test_elements_beyond_two_to_the_31_in_one_sample(n: int) -> None:
    """The first and the last program, those on both sides of element 2**31, and the last of the grid."""
    counter = make_counter(1, True, torch.Generator().manual_seed(1))
    rows, row = make_rows(1, True, torch.Generator().manual_seed(2))
    launch = p_sample_variant("huge", step_case("clip", shape=(1, n))).launch
    size = 4 * kernel_launch.TILE * launch.arguments["repeat"]
    middle, last, end = 2**31 // size, (n - 1) // size, launch.grid[1] * launch.grid[2] - 1
    programs = sorted({0, middle - 1, middle, last, end})
    windows = [slice(p * size, min((p + 1) * size, n)) for p in programs if p <= last]
    x, m, out = filled(n, windows, seed=3), filled(n, windows, seed=4), filled(n, [])
    device = PtxDevice(select_blocks=lambda grid: programs, output_arguments=OUTPUTS)
    with device.active():
        p_sample_kernel((out[None], None, None), x[None], m[None], rows, row, counter, CLIP, None)
    for window in windows:
        z = noise_window(counter, window)
        expected, *_ = step.p_sample(x[None, window], m[None, window], rows, row, z, CLIP)
        assert_same_bits(out[None, window], expected)
    assert device.traffic(out).stored == 4 * sum(window.stop - window.start for window in windows)


def test_elements_beyond_two_to_the_31_in_a_batch() -> None:
    """Three samples of 2**30 elements: the third starts at 2**31."""
    batch, n = 3, 2**30
    counter = make_counter(batch, False, torch.Generator().manual_seed(1), stream=2)
    rows, row = torch.randn(2, 2), torch.tensor([0, 1, 0])
    window = slice(n - 1024, n)
    x = torch.from_numpy(sparse_zeros(batch * n, "int16")).view(BF16).view(batch, n)
    x[:, window] = torch.randn(batch, 1024, generator=torch.Generator().manual_seed(2)).to(BF16)
    out = torch.from_numpy(sparse_zeros(batch * n, "int16")).view(BF16).view(batch, n)
    device = PtxDevice(select_blocks=lambda grid: [s + grid[0] * (n // 1024 - 1) for s in range(batch)])
    device.output(out)
    with device.active():
        q_sample_kernel((out, None), x, rows, row, counter)
    for s in range(batch):
        alone = Counter(counter.seed[s : s + 1], counter.sample_id[s : s + 1], counter.step, 2)
        expected, _ = step.q_sample(x[s : s + 1, window], rows, row[s : s + 1], noise_window(alone, window))
        assert_same_bits(out[s : s + 1, window], expected.to(BF16))
