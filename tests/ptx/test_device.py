"""Compiled Triton kernels on the stub driver: launched by Triton, executed by the PTX interpreter."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from tests.ptx import toys
from tests.ptx.device import PtxDevice
from tests.ptx.memory import AccessError

RANDOM123 = {
    # Known answers of Random123 1.14, kat_vectors, philox4x32 10: counter, key, result.
    "zeros": ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    "ones": ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    "pi": (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
}


def add(x: torch.Tensor, y: torch.Tensor, out: torch.Tensor, block: int = 1024) -> None:
    grid = (-(-x.numel() // block),)
    toys.masked_add[grid](x, y, out, x.numel(), BLOCK=block, enable_fp_fusion=False)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("n_elements", [1, 1000, 2048, 5001])
def test_masked_add_equals_torch(n_elements: int, dtype: torch.dtype, arch: int) -> None:
    generator = torch.Generator().manual_seed(n_elements)
    x = torch.randn(n_elements, generator=generator).to(dtype)
    y = torch.randn(n_elements, generator=generator)
    device = PtxDevice(arch)
    out = device.output(torch.empty(n_elements, dtype=dtype))
    with device.active():
        add(x, y, out)
    device.check_written_once()
    assert torch.equal(out, (x.float() + y).to(dtype))
    assert device.traffic(x).loaded == device.traffic(out).stored == n_elements * x.element_size()


@pytest.mark.parametrize("name", RANDOM123)
def test_compiled_philox_gives_random123s_known_answers(name: str) -> None:
    counter, key, expected = (torch.tensor(v, dtype=torch.int64).to(torch.uint32) for v in RANDOM123[name])
    device = PtxDevice()
    out = device.output(torch.empty(4, dtype=torch.uint32))
    with device.active():
        toys.philox_words[(1,)](counter, key, out, COUNT=1, enable_fp_fusion=False)
    assert torch.equal(out.view(torch.int32), expected.view(torch.int32))


def test_clamp_keeps_nan_and_clips_infinity() -> None:
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.5, -2.0, 3.0, -0.0, 1e-40])
    device = PtxDevice()
    out = device.output(torch.empty(8))
    with device.active():
        toys.clamp[(1,)](x, torch.tensor([-1.0, 1.0]), out, 8, BLOCK=128, enable_fp_fusion=False)
    assert out.isnan().tolist() == x.isnan().tolist()
    assert torch.equal(out[1:].view(torch.int32), x[1:].clamp(-1, 1).view(torch.int32))


@pytest.mark.parametrize("rows", [1, 3, 10])
def test_loop_runs_as_often_as_its_argument_says(rows: int) -> None:
    x = torch.randn(rows, 300, generator=torch.Generator().manual_seed(rows))
    device = PtxDevice()
    out = device.output(torch.empty(300))
    with device.active():
        toys.sum_rows[(3,)](x, out, rows, 300, BLOCK=128, enable_fp_fusion=False)
    expected = torch.zeros(300)
    for row in x:
        expected = expected + row
    device.check_written_once()
    assert torch.equal(out, expected)


def test_a_mask_one_element_too_wide_is_caught() -> None:
    device = PtxDevice()
    out = device.output(torch.empty(1000))
    with device.active(), pytest.raises(AccessError, match="out of bounds"):
        toys.past_the_end[(1,)](torch.zeros(1000), out, 1000, BLOCK=1024, enable_fp_fusion=False)


def test_a_wider_access_than_the_pointer_allows_is_caught() -> None:
    """Triton specialised for a 16-byte aligned pointer: the same binary on another pointer must not go unseen."""
    device = PtxDevice()
    storage = torch.zeros(2052)
    out = device.output(torch.empty(2048))
    with device.active():
        aligned = toys.masked_add.warmup(storage, storage, out, 2048, BLOCK=1024, enable_fp_fusion=False, grid=(2,))
        with pytest.raises(AccessError, match="unaligned"):
            aligned[(2, 1, 1)](storage[1:2049], storage, out, 2048, 1024)


def test_an_output_left_unwritten_is_caught() -> None:
    device = PtxDevice()
    out = device.output(torch.empty(2048))
    with device.active():
        toys.masked_add[(1,)](torch.zeros(2048), torch.zeros(2048), out, 2048, BLOCK=1024, enable_fp_fusion=False)
    with pytest.raises(AccessError, match="1024 units missing"):
        device.check_written_once()


def test_an_output_written_twice_is_caught() -> None:
    device = PtxDevice()
    out = device.output(torch.empty(1024))
    with device.active():
        for _ in range(2):
            add(torch.zeros(1024), torch.zeros(1024), out)
    with pytest.raises(AccessError, match="1024 extra"):
        device.check_written_once()


def test_an_undeclared_output_is_caught() -> None:
    with PtxDevice().active(), pytest.raises(AccessError, match="write to an input"):
        add(torch.zeros(8), torch.zeros(8), torch.zeros(8))


def test_in_place_add_reads_and_writes_each_element_once() -> None:
    device = PtxDevice()
    x, y = torch.arange(5001.0), torch.full((5001,), 2.0)
    device.in_place(x)
    with device.active():
        add(x, y, x)
    device.check_written_once()
    assert torch.equal(x, torch.arange(5001.0) + 2)
    assert device.traffic(x).loaded == device.distinct_loaded(x) == device.traffic(x).stored == 5001 * 4


def test_gaps_of_a_strided_tensor_are_unreadable() -> None:
    device = PtxDevice()
    x = torch.zeros(64)[::2]
    out = device.output(torch.empty(32))
    with device.active(), pytest.raises(AccessError, match="never written"):
        add(x, torch.zeros(32), out)


def test_a_grid_that_no_gpu_accepts_is_refused() -> None:
    with PtxDevice(execute=False).active(), pytest.raises(AccessError, match="grid"):
        toys.masked_add[(1, 65536)](
            torch.zeros(8), torch.zeros(8), torch.zeros(8), 8, BLOCK=1024, enable_fp_fusion=False
        )


def test_each_device_compiles_for_itself_once_per_specialisation() -> None:
    device = PtxDevice(execute=False)
    x, out = torch.zeros(4096), torch.zeros(4096)
    with device.active():
        add(x, x, out)
        add(x, x[:2048], out)
        assert len(device.compiled) == 1
        add(x[1:1001], x, out)
        assert len(device.compiled) == 2
        add(x[: 16 * 17 + 1], x, out)
        assert len(device.compiled) == 3
    assert [launch.grid for launch in device.launches] == [(4, 1, 1), (4, 1, 1), (1, 1, 1), (1, 1, 1)]
