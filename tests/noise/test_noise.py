"""noise-v1: known answers, the counter's words, accuracy, and what the bits may not depend on."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from torch import Tensor

from fastddpm.noise import v1 as noise
from fastddpm.noise.known_answers import NOISE_V1
from fastddpm.noise.seeds import resolve_seeds
from tests.ops.oracles import box_muller64, normal64, philox4x32_10

# Random123's kat_vectors for philox4x32-10: counter, key, result.
RANDOM123 = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def words(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def draw(seed: int, sample_id: int, step: int, stream: int, n: int) -> Tensor:
    keys, ids = resolve_seeds(seed=seed, sample_ids=[sample_id])
    return noise.normals(keys, ids, words(step), stream, n)


def digest(x: Tensor) -> str:
    return hashlib.sha256(x.numpy().tobytes()).hexdigest()


@pytest.mark.parametrize(("counter", "key", "result"), RANDOM123, ids=["zeros", "ones", "pi"])
def test_philox_passes_random123_known_answers(
    counter: tuple[int, ...], key: tuple[int, int], result: tuple[int, ...]
) -> None:
    seeds, _ = resolve_seeds(seeds=[key[0] | key[1] << 32])
    g, step, sample_id, stream = counter
    got = noise.philox(seeds, words(sample_id), words(step), stream, words(g))
    assert tuple(int(r) for r in got) == result


@pytest.mark.parametrize("element", [0, 1, 2, 3, 4, 1023, 2**33 + 1], ids=lambda i: f"element{i}")
def test_normals_put_each_word_of_the_counter_in_its_place(element: int) -> None:
    """All words differ, so that a swapped, dropped or truncated one changes the result."""
    seed, sample_id, step, stream = 0x0123456789ABCDEF, 0x89ABCDEF, 0x12345678, 3
    keys, ids = resolve_seeds(seed=seed, sample_ids=[sample_id])
    r = noise.philox(keys, ids, words(step), stream, words(element // 4))
    assert tuple(int(x) for x in r) == philox4x32_10(
        (element // 4, step, sample_id, stream), (seed & 0xFFFFFFFF, seed >> 32)
    )
    pair = element % 4 // 2
    got = float(noise.box_muller(r[2 * pair], r[2 * pair + 1])[element % 2])
    assert got == pytest.approx(normal64(seed, sample_id, step, stream, element), abs=1e-6)


def test_normals_lay_four_normals_of_a_counter_out_in_order() -> None:
    got = draw(5, 6, 7, 1, 10)[0]
    expected = torch.tensor([normal64(5, 6, 7, 1, i) for i in range(10)], dtype=torch.float64)
    assert (got.double() - expected).abs().max() <= 1e-6


@pytest.mark.parametrize("case", NOISE_V1, ids=str)
def test_normals_match_the_released_digests(case: tuple[int, int, int, int, int]) -> None:
    assert digest(draw(*case)) == NOISE_V1[case]


def test_box_muller_is_within_1e6_of_float64() -> None:
    r = noise.philox(words(9), words(0), words(0), 1, torch.arange(1 << 21))
    for radius, angle in ((r[0], r[1]), (r[2], r[3])):
        got = noise.box_muller(radius, angle)
        expected = box_muller64(radius.numpy().astype(np.uint32), angle.numpy().astype(np.uint32))
        for z, z64 in zip(got, expected, strict=True):
            assert np.abs(z.double().numpy() - z64).max() <= 1e-6


def test_box_muller_holds_its_accuracy_at_every_radius_and_angle() -> None:
    """Radii in each octave of u and angles at and around each axis, in all combinations; beyond 5.8 sigma 1.5e-6."""
    octaves = [min(2**k + d, 2**32 - 1) for k in range(33) for d in (0, 1, 3, 2**k // 3, 2**k - 1)]
    axes = [(q * 2**30 + d) % 2**32 for q in range(4) for d in (-(2**20), -2, -1, 0, 1, 2, 2**20, 2**28, 2**29)]
    grid = torch.cartesian_prod(words(*octaves), words(*axes)).unbind(1)
    got = noise.box_muller(*grid)
    expected = box_muller64(*(g.numpy().astype(np.uint32) for g in grid))
    for z, z64 in zip(got, expected, strict=True):
        error = np.abs(z.double().numpy() - z64)
        assert error[np.abs(z64) <= 5.8].max() <= 1.1e-6
        assert error.max() <= 1.5e-6


def test_box_muller_spans_zero_to_6_66_sigma() -> None:
    radius, angle = words(2**32 - 1, 0, 0, 0), words(0, 0, 2**31, 2**30)
    cos, sin = noise.box_muller(radius, angle)
    assert cos[0] == 0.0
    assert sin[0] == 0.0
    assert float(cos[1]) == pytest.approx(6.6604, abs=1e-4)
    assert float(cos[2]) == -float(cos[1])
    assert float(sin[3].abs()) == pytest.approx(6.6604, abs=1e-4)


def test_normals_do_not_depend_on_how_many_are_drawn() -> None:
    """200,001 elements are drawn in several blocks, the prefix in one."""
    whole = draw(3, 4, 5, 1, 200_001)
    for n in (0, 1, 5, 1023, 131_073):
        assert torch.equal(whole[:, :n], draw(3, 4, 5, 1, n))


def test_normals_do_not_depend_on_the_batch() -> None:
    keys, ids = resolve_seeds(seeds=[11, 2**63 + 1, 11, 0])
    step = words(0, 1, 2, 3)
    together = noise.normals(keys, ids, step, 1, 40_000)
    for b in (2, 0, 3, 1):
        alone = noise.normals(keys[b : b + 1], ids[b : b + 1], step[b : b + 1], 1, 40_000)
        assert torch.equal(together[b : b + 1], alone)


@pytest.mark.parametrize("n", [2, 4, 6, 130])
def test_pairs_are_the_normals_two_by_two(n: int) -> None:
    seed, sample_id, step = words(7, 2**63 - 1, -1), words(0, 2**32 - 1, 5), words(9)
    out = noise.pairs(seed, sample_id, step, noise.STREAM_REVERSE, n // 2)
    assert torch.equal(out.view(torch.float32), noise.normals(seed, sample_id, step, noise.STREAM_REVERSE, n))


def test_normals_broadcast_one_value_for_all_samples() -> None:
    keys, ids = resolve_seeds(seed=1, batch=3)
    assert torch.equal(noise.normals(keys, ids, words(9), 1, 5), noise.normals(keys, ids, words(9, 9, 9), 1, 5))


@pytest.mark.parametrize("n", [-1, 2**34 + 1])
def test_normals_refuse_a_count_out_of_range(n: int) -> None:
    with pytest.raises(ValueError, match=r"2\*\*34"):
        noise.normals(words(0), words(0), words(0), 1, n)


def test_normals_ignore_flushing_of_denormals() -> None:
    expected = draw(1, 0, 0, 1, 1 << 16)
    try:
        if not torch.set_flush_denormal(True):
            pytest.skip("this processor cannot flush denormals")
        assert torch.equal(draw(1, 0, 0, 1, 1 << 16), expected)
    finally:
        torch.set_flush_denormal(False)


def test_timesteps_are_uniform_and_reproducible() -> None:
    T, n = 10, 1 << 16
    t = noise.timesteps(n, T, seed=4, step=7)
    assert t.dtype == torch.int64
    counts = torch.bincount(t, minlength=T).double()
    assert len(counts) == T
    assert (counts - n / T).abs().max() <= 5 * (n / T * (1 - 1 / T)) ** 0.5
    assert torch.equal(t[100:200], noise.timesteps(100, T, 4, 7, sample_ids=range(100, 200)))
    assert not torch.equal(t, noise.timesteps(n, T, seed=4, step=8))


def test_timesteps_take_the_first_word_of_stream_3() -> None:
    word = philox4x32_10((0, 7, 2, 3), (4, 0))[0]
    assert int(noise.timesteps(3, 1000, seed=4, step=7)[2]) == word * 1000 >> 32
    assert noise.timesteps(3, 1, seed=4, step=7).tolist() == [0, 0, 0]


@pytest.mark.parametrize("T", [0, -1, 2**31 + 1])
def test_timesteps_refuse_T_out_of_range(T: int) -> None:
    with pytest.raises(ValueError, match=f"got {T}"):
        noise.timesteps(2, T, 0, 0)


def test_resolve_seeds_writes_large_seeds_as_twos_complement() -> None:
    keys, ids = resolve_seeds(seeds=[0, 1, 2**31, 2**63 - 1, 2**63, 2**64 - 1])
    assert keys.tolist() == [0, 1, 2**31, 2**63 - 1, -(2**63), -1]
    assert ids.tolist() == [0] * 6


def test_resolve_seeds_numbers_the_samples_of_one_seed() -> None:
    assert resolve_seeds(seed=7, batch=3)[1].tolist() == [0, 1, 2]
    keys, ids = resolve_seeds(seed=7, sample_ids=torch.tensor([5, 2**32 - 1]))
    assert keys.tolist() == [7, 7]
    assert ids.tolist() == [5, 2**32 - 1]
    assert resolve_seeds(seeds=np.arange(3, dtype=np.uint64))[0].tolist() == [0, 1, 2]
    assert resolve_seeds(seeds=[4, 4])[0].tolist() == [4, 4]


BAD_SEEDS = {
    "negative": ({"seeds": [-1]}, r"seeds\[0\] .* got -1"),
    "2**64": ({"seeds": [0, 2**64]}, r"seeds\[1\] .* got 18446744073709551616"),
    "float": ({"seeds": [1.0]}, r"seeds\[0\] must be an integer .*, got 1.0"),
    "bool": ({"seed": True, "batch": 1}, "seed must be an integer .*, got True"),
    "string": ({"seeds": "12"}, "sequence of integers"),
    "number for a sequence": ({"seeds": 3}, "sequence of integers"),
    "float tensor": ({"seeds": torch.tensor([1.5])}, r"got 1.5"),
    "two-dimensional": ({"seeds": torch.zeros(2, 2, dtype=torch.int64)}, "one-dimensional"),
    "negative id": ({"seed": 0, "sample_ids": [-1]}, r"sample_ids\[0\] .* got -1"),
    "id 2**32": ({"seed": 0, "sample_ids": [2**32]}, r"sample_ids\[0\] .* got 4294967296"),
    "neither": ({"batch": 2}, "exactly one"),
    "both": ({"seed": 0, "seeds": [0]}, "exactly one"),
    "ids with seeds": ({"seeds": [0], "sample_ids": [0]}, "goes with seed="),
    "no batch": ({"seed": 0}, "batch size"),
    "count": ({"seeds": [0, 1], "batch": 3}, "2 seeds or sample ids for a batch of 3"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD_SEEDS.values(), ids=BAD_SEEDS)
def test_resolve_seeds_refuses(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_seeds(**arguments)  # type: ignore[arg-type]
