"""Interleaved rounds and their statistics, against a clock that the test turns."""

from __future__ import annotations

import pytest
import torch
from fastddpm.benchmarks.harness import clock
from fastddpm.benchmarks.harness.case import NAMES, find
from fastddpm.benchmarks.harness.compare import NOISY, Quantiles, compare, ratio


def test_compare_interleaves_rounds() -> None:
    asked: list[str] = []

    def scripted(name: str) -> float:
        asked.append(name)
        return 1.0

    compare({name: lambda name=name: scripted(name) for name in "ABC"}, rounds=3)  # type: ignore[misc]
    assert asked == list("ABCABCABC")


def test_compare_keeps_every_round() -> None:
    script = iter([3.0, 1.0, 9.0])
    assert compare({"A": lambda: next(script)}, rounds=3) == {"A": [3.0, 1.0, 9.0]}


def test_ratio_is_taken_round_by_round() -> None:
    """A machine that slows down tenfold in the middle changes no ratio."""
    drift = [1.0, 1.1, 1.2, 1.3, 10.0, 11.0, 12.0]
    assert ratio([2 * d for d in drift], drift) == (2.0, 2.0, 2.0)


def test_ratio_is_no_quotient_of_medians() -> None:
    baseline, other = [1.0, 2.0, 9.0], [1.0, 4.0, 3.0]
    assert ratio(baseline, other).p50 == 1.0
    assert Quantiles.of(baseline).p50 / Quantiles.of(other).p50 != 1.0


def test_ratio_uses_unrounded_seconds() -> None:
    assert ratio([1.2345678e-6], [1.2345679e-6]).p50 == 1.2345678e-6 / 1.2345679e-6 != 1.0


def test_ratio_of_unequal_rounds_raises() -> None:
    with pytest.raises(ValueError, match="shorter"):
        ratio([1.0, 1.0], [1.0])


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(1.01, 1.2, "faster"), (0.8, 0.99, "slower"), (0.97, 1.02, "tie"), (1.0, 1.1, "tie")],
)
def test_ratio_calls_a_tie_a_tie(low: float, high: float, verdict: str) -> None:
    assert Quantiles(low, (low + high) / 2, high).verdict == verdict


def test_percentiles_lie_between_rounds() -> None:
    assert Quantiles.of((4.0, 1.0, 2.0, 3.0, 6.0)) == pytest.approx((1.8, 3.0, 4.4), rel=1e-12)


def test_spread_tells_a_noisy_machine() -> None:
    assert Quantiles.of((1.0, 1.01, 1.02, 1.0, 1.01, 1.0, 5.0)).spread <= NOISY
    assert Quantiles.of((1.0, 1.2, 1.0, 1.3, 1.1, 1.4, 1.0)).spread > NOISY


@pytest.mark.parametrize("rounds", [0, -1])
def test_compare_without_rounds_raises(rounds: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        compare({"A": lambda: 1.0}, rounds=rounds)


@pytest.mark.parametrize("name", NAMES)
def test_no_two_providers_of_a_benchmark_share_a_name(name: str) -> None:
    names = [provider.name for provider in find(name).providers]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(("seconds", "calls"), [(10.0, 1), (1.0, 1 + 5)], ids=["long", "short"])
def test_cpu_clock_repeats_short_calls_only(seconds: float, calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole loop takes minutes: its first round is not thrown away."""
    now = [0.0]

    def work() -> None:
        now[0] += seconds

    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    watch = clock.CpuClock(work, min_seconds=5.0)
    assert watch.time() == seconds
    assert now[0] == calls * seconds


def test_a_call_that_waits_for_the_device_is_found_without_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    mode = [0]
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: mode[0])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda new: mode.__setitem__(0, new))

    def waits() -> None:
        if mode[0] == "error":
            raise RuntimeError("called a synchronizing CUDA operation")

    assert clock._waits(waits)
    assert not clock._waits(lambda: None)
    assert mode == [0]


@pytest.mark.gpu
def test_cuda_clock_launches_a_call_that_waits_eagerly_and_the_device_goes_on() -> None:
    x = torch.ones(3, device="cuda")
    waiting = clock.CudaClock(lambda: x.sum().item(), small=True, calls=2)
    graphed = clock.CudaClock(lambda: x.mul_(1.0), small=True, calls=2)
    assert waiting.how.endswith("launched eagerly")
    assert graphed.how.endswith("replayed from a graph")
    assert waiting.time() > 0
    assert torch.randn(3, device="cuda").isfinite().all()
