"""What a call costs the host and what it compiles, on a stub driver that records launches."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from fastddpm.kernels import launch as kernel_launch

from fastddpm.diagnostics.step_cases import make_counter, make_rows, step_case
from fastddpm.diagnostics.variants import p_sample_variant
from fastddpm.noise.v1 import Counter
from fastddpm.ops.p_sample import p_sample_kernel
from fastddpm.ops.q_sample import q_sample_kernel
from fastddpm.ops.randn import randn_kernel
from fastddpm.ops.twins import Flags
from tests.ptx.device import PtxDevice

CLIP = Flags(clip=True)


def p_sample(batch: int = 4, shape: tuple[int, ...] = (3, 32, 32), seed: int = 0, offset: int = 0) -> None:
    """One step on fresh tensors; ``offset`` elements into their storage."""
    generator = torch.Generator().manual_seed(seed)
    size = (batch, *shape)
    count = torch.Size(size).numel()
    x_t, m, out = (torch.zeros(count + offset)[offset:].view(size) for _ in range(3))
    rows, row = make_rows(batch, bool(seed % 2), generator)
    counter = make_counter(batch, bool(seed % 3), generator)
    p_sample_kernel((out, None, None), x_t, m, rows, row, counter, CLIP, None)


def q_sample(batch: int = 4, shape: tuple[int, ...] = (3, 32, 32), seed: int = 0, offset: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    size = (batch, *shape)
    count = torch.Size(size).numel()
    x_0, out = (torch.zeros(count + offset)[offset:].view(size) for _ in range(2))
    row = torch.zeros(batch, dtype=torch.int64)
    q_sample_kernel((out, None), x_0, torch.ones(5, 2), row, make_counter(batch, False, generator))


def randn(batch: int = 4, shape: tuple[int, ...] = (3, 32, 32), seed: int = 0, offset: int = 0) -> None:
    counter = make_counter(batch, bool(seed % 2), torch.Generator().manual_seed(seed), stream=seed % 5)
    n = torch.Size(shape).numel()
    randn_kernel((torch.zeros(batch * n + offset)[offset:].view(batch, n),), counter, n)


OPERATIONS = [p_sample, q_sample, randn]


@pytest.fixture
def device() -> PtxDevice:
    return PtxDevice(execute=False)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_seed_step_id_and_batch_size_compile_nothing_new(operation: Callable[..., None], device: PtxDevice) -> None:
    with device.active():
        for batch in (4, 1, 2, 7, 16, 64):
            for seed in range(6):
                operation(batch, seed=seed)
    assert len(device.launches) == 36
    assert len(device.compiled) == 1


def test_a_batch_whose_programs_walk_several_tiles_compiles_nothing_new(device: PtxDevice) -> None:
    with device.active():
        p_sample(batch=4)
        p_sample(batch=6336)
    assert [dict(launch.arguments)["repeat"] for launch in device.launches] == [1, 3]
    assert len(device.compiled) == 1


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**63 - 1, -(2**63)])
def test_the_seeds_that_specialise_integers_compile_nothing_new(seed: int, device: PtxDevice) -> None:
    """0, 1 and multiples of 16 are where Triton specialises scalar arguments: seeds are none."""
    with device.active():
        for value in (5, seed):
            word = torch.tensor([value])
            counter = Counter(word, torch.tensor([value & 0xFFFFFFFF]), word & 1, 1)
            randn_kernel((torch.zeros(2, 64),), counter, 64)
    assert len(device.compiled) == 1


def test_what_was_compiled_ahead_from_tensors_without_data_is_what_is_launched(device: PtxDevice) -> None:
    ahead = p_sample_variant("ahead", step_case("clip", shape=(2, 3, 32, 32))).launch
    with device.active():
        with ThreadPoolExecutor(2) as pool, importlib.import_module("triton").AsyncCompileMode(pool):
            ahead.compile()
        assert (len(device.compiled), device.launches) == (1, [])
        p_sample()
    assert len(device.compiled) == len(device.launches) == 1


@pytest.mark.parametrize("operation", OPERATIONS)
def test_odd_sizes_and_unaligned_storage_share_one_more_variant(
    operation: Callable[..., None], device: PtxDevice
) -> None:
    with device.active():
        operation()
        operation(shape=(3, 64, 64))
        operation(shape=(3, 256, 256), batch=1)
        assert len(device.compiled) == 1
        operation(shape=(3, 31, 33))
        operation(shape=(3, 33, 33))
        operation(offset=1)
        operation(offset=3)
        assert len(device.compiled) == 2
        operation(offset=4)
        operation(shape=(3, 34, 34))
    assert len(device.compiled) == 2


def test_all_sizes_together_compile_a_bounded_number_of_variants(device: PtxDevice) -> None:
    """One per block size, and one per block size for what is not aligned."""
    blocks = {kernel_launch.block_groups(groups) for groups in range(1, 2**16)}
    assert len(blocks) <= 9
    with device.active():
        for n in (1, 2, 3, 4, 5, 8, 12, 16, 100, 192, 784, 1000, 1023, 1024, 1025, 3072, 4096):
            randn(2, (n,))
    assert len(device.compiled) <= 2 * len(blocks)


def test_a_replay_with_new_contents_has_the_same_arguments(device: PtxDevice) -> None:
    """A CUDA graph keeps every integer and address: what changes between steps must lie in memory."""
    x, m = torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 8, 8)
    rows, row = make_rows(2, False, torch.Generator().manual_seed(0))
    counter = make_counter(2, False, torch.Generator().manual_seed(0))
    with device.active():
        for _ in range(3):
            p_sample_kernel((x, None, None), x, m, rows, row, counter, CLIP, None)
            rows.mul_(2)
            for static in (row, *counter[:3]):
                static.add_(1)
    first, *others = [launch.arguments for launch in device.launches]
    assert others == [first, first]


class Operators(TorchDispatchMode):
    """Collects the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def one_step(channels_last: bool) -> Callable[[], None]:
    """A step on tensors that exist, as in a sampling loop."""
    x, m = torch.zeros(2, 3, 32, 32), torch.zeros(2, 3, 32, 32)
    low = torch.zeros(2, 3, 32, 32, dtype=torch.bfloat16)
    if channels_last:
        m, low = (t.contiguous(memory_format=torch.channels_last) for t in (m, low))
    rows, row = make_rows(2, False, torch.Generator().manual_seed(0))
    counter = make_counter(2, False, torch.Generator().manual_seed(0))
    return lambda: p_sample_kernel((x, None, low), x, m, rows, row, counter, CLIP, None)


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_step_is_one_launch_and_no_operator_but_views(channels_last: bool, device: PtxDevice) -> None:
    run = one_step(channels_last)
    with device.active():
        run()
        with Operators() as operators:
            run()
    assert len(device.launches) == 2
    assert set(operators.names) <= {"aten.view.default", "aten.permute.default", "aten._unsafe_view.default"}


def test_a_step_costs_the_host_few_python_calls(device: PtxDevice) -> None:
    """Calls of Python functions, Triton's own included (five for each constant its kernel names, 110 in all)."""
    run = one_step(False)
    calls = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event == "call" and not frame.f_code.co_filename.endswith("ptx/device.py")

    with device.active():
        run()
        sys.setprofile(count)
        try:
            run()
        finally:
            sys.setprofile(None)
    assert calls <= 180, calls


@pytest.mark.parametrize(
    ("batch", "shape", "grid"),
    [
        (64, (3, 32, 32), (64, 3, 1)),
        (1, (3, 256, 256), (1, 192, 1)),
        (100_000, (2,), (391, 1, 1)),
        (1, (1,), (1, 1, 1)),
    ],
)
def test_launch_configuration(
    batch: int, shape: tuple[int, ...], grid: tuple[int, int, int], device: PtxDevice
) -> None:
    with device.active():
        q_sample(batch, shape)
    (launch,) = device.launches
    assert (launch.grid, launch.num_warps) == (grid, 4)
