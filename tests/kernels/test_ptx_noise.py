"""The compiled sm_90 code of noise-v1 and q_sample, executed on the CPU: same bits as the twins and known answers."""

from __future__ import annotations

import hashlib

import pytest
import torch

pytest.importorskip("triton")

from fastddpm.diagnostics.step_cases import arrange, make_counter
from fastddpm.noise import v1 as noise
from fastddpm.noise.known_answers import NOISE_V1
from fastddpm.noise.seeds import resolve_seeds
from fastddpm.noise.v1 import Counter
from fastddpm.ops import twins
from fastddpm.ops.q_sample import q_sample_kernel
from fastddpm.ops.randn import randn_kernel
from fastddpm.ops.twins import fill
from tests.ptx.device import PtxDevice
from tests.ptx.steps import OUTPUTS, assert_same_bits, spiced

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# (B, n): one to five elements, one more and one less than a tile, an image, and 2-D points in a tile of many samples.
SIZES = [(2, 1), (130, 2), (3, 3), (2, 4), (3, 5), (2, 1023), (2, 1025), (3, 192), (2, 3072)]
# The 16-bit types differ in their stores alone: one by one, and a group at a time.
DRAWS = [(*size, FP32) for size in SIZES] + [(*size, dtype) for dtype in (BF16, FP16) for size in ((3, 5), (3, 192))]


def draw(counter: Counter, batch: int, n: int, dtype: torch.dtype = FP32, arch: int = 90) -> torch.Tensor:
    """Noise by the compiled kernel, every element of it written once."""
    device = PtxDevice(arch, output_arguments=OUTPUTS)
    out = torch.empty(batch, n, dtype=dtype)
    with device.active():
        randn_kernel((out,), counter, n)
    device.check_written_once()
    return out


@pytest.mark.parametrize(("batch", "n", "dtype"), DRAWS, ids=str)
def test_randn_has_the_twins_bits(batch: int, n: int, dtype: torch.dtype) -> None:
    counter = make_counter(batch, False, torch.Generator().manual_seed(n), stream=n % 5)
    assert_same_bits(draw(counter, batch, n, dtype), noise.normals(*counter, n).to(dtype))


@pytest.mark.parametrize("key", NOISE_V1, ids=str)
def test_randn_gives_the_committed_known_answers(key: tuple[int, int, int, int, int]) -> None:
    seed, sample_id, step, stream, n = key
    counter = noise.counter(resolve_seeds(seed=seed, sample_ids=[sample_id]), step, stream)
    digest = hashlib.sha256(draw(counter, 1, n).numpy().astype("<f4").tobytes()).hexdigest()
    assert digest == NOISE_V1[key]


def test_randn_compiled_for_sm_80_has_the_same_bits() -> None:
    counter = make_counter(2, False, torch.Generator().manual_seed(0))
    assert torch.equal(draw(counter, 2, 3072, arch=80), noise.normals(*counter, 3072))


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**63 - 1, -(2**63), -1])
def test_randn_takes_every_seed(seed: int) -> None:
    counter = Counter(torch.tensor([seed]), torch.tensor([0]), torch.tensor([0]), 1)
    assert torch.equal(draw(counter, 1, 64), noise.normals(*counter, 64))


def test_a_sample_has_the_same_noise_alone_and_in_any_batch() -> None:
    whole = make_counter(37, False, torch.Generator().manual_seed(3))
    together = draw(whole, 37, 60)
    for k in (0, 17, 36):
        alone = Counter(whole.seed[k : k + 1], whole.sample_id[k : k + 1], whole.step, whole.stream)
        assert torch.equal(draw(alone, 1, 60)[0], together[k])


Q_CASES = [
    # shape, dtype of x_0, noise, eps returned, layout of x_0
    ((2, 3, 32, 32), FP32, "counter", True, "contiguous"),
    ((2, 3, 32, 32), FP32, "counter", False, "contiguous"),
    ((2, 3, 32, 32), BF16, "counter", True, "contiguous"),
    ((2, 3, 32, 32), FP16, "counter", False, "channels_last"),
    ((2, 3, 32, 32), FP32, "given", False, "expanded"),
    ((2, 3, 32, 32), FP16, "given", True, "shifted"),
    ((2, 1, 1, 1), FP32, "counter", True, "contiguous"),
    ((130, 2), FP32, "counter", True, "contiguous"),
    ((3, 3), BF16, "given", True, "contiguous"),
    ((5, 4), FP32, "counter", False, "shifted"),
    ((3, 5), FP16, "counter", True, "contiguous"),
    ((2, 3, 11, 31), FP32, "counter", True, "channels_last"),
    ((1, 1, 41, 25), BF16, "counter", False, "contiguous"),
    ((3, 3, 8, 8), FP32, "counter", True, "contiguous"),
]


@pytest.mark.parametrize(("shape", "dtype", "source", "with_eps", "layout"), Q_CASES, ids=str)
def test_q_sample_has_the_twins_bits(
    shape: tuple[int, ...], dtype: torch.dtype, source: str, with_eps: bool, layout: str
) -> None:
    generator = torch.Generator().manual_seed(sum(shape))
    x_0 = arrange(spiced(torch.randn(shape, generator=generator), generator).to(dtype), layout)
    rows, row = torch.randn(7, 2, generator=generator), torch.randint(0, 7, (shape[0],), generator=generator)
    given = torch.randn(shape, generator=generator).to(dtype)
    eps = given if source == "given" else make_counter(shape[0], False, generator, stream=2)
    twin, kernel = (
        (torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype) if with_eps else None) for _ in range(2)
    )
    fill(twins.q_sample, twin, (x_0, rows, row, eps), False)
    device = PtxDevice(output_arguments=OUTPUTS)
    with device.active():
        q_sample_kernel(kernel, x_0, rows, row, eps)
    device.check_written_once()
    for expected, actual in zip(twin, kernel, strict=True):
        assert (expected is None) == (actual is None)
        if expected is not None and actual is not None:
            assert_same_bits(actual, expected)


def test_an_empty_batch_launches_nothing() -> None:
    device = PtxDevice(output_arguments=OUTPUTS)
    empty = torch.zeros(0, dtype=torch.int64)
    counter = Counter(empty, empty, torch.zeros(1, dtype=torch.int64), 1)
    with device.active():
        randn_kernel((torch.empty(0, 12),), counter, 12)
        q_sample_kernel((torch.empty(0, 12), None), torch.empty(0, 12), torch.ones(1, 2), empty, counter)
    assert device.launches == []
