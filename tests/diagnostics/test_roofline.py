"""The roofline: worked figures, and the sources that every data sheet names."""

from __future__ import annotations

import pytest

from fastddpm.diagnostics.gpus import GPUS, Gpu, default_gpu, find_gpu, roofline

ROUND = Gpu("round", "sm_90", bandwidth=1e12, processors=100, clock=1e9, l2=48_000_000, source="made up")


def test_roofs_are_bytes_and_instructions_over_their_rates() -> None:
    result = roofline(ROUND, 12.0, 64.0, {"integer": 16.0, "integer multiply": 32.0})
    assert result.dram == pytest.approx(12e-12)
    assert result.issue == pytest.approx(64 / (100 * 128 * 1e9))
    assert result.integer == pytest.approx(32 / (100 * 64 * 1e9))
    assert result.l2_elements == 4_000_000


@pytest.mark.parametrize(
    ("bytes_per_element", "executed", "integer", "binds"),
    [(12.0, 70.0, 20.0, "DRAM"), (4.0, 70.0, 20.0, "issue"), (4.0, 70.0, 50.0, "integer")],
)
def test_the_slowest_roof_binds(bytes_per_element: float, executed: float, integer: float, binds: str) -> None:
    result = roofline(ROUND, bytes_per_element, executed, {"integer": integer})
    assert result.binds == binds
    assert (result.compute_share < 1) == (binds == "DRAM")


def test_h100_leaves_120_issue_slots_per_12_bytes() -> None:
    """132 SMs x 128 lanes x 1.98 GHz over 3.35 TB/s / 12 B."""
    gpu = find_gpu("h100 sxm")
    assert gpu.issue_rate / (gpu.bandwidth / 12) == pytest.approx(119.8, abs=0.1)


def test_peak_float32_rate_of_the_data_sheets_is_reproduced() -> None:
    for name, tflops in {"H100 SXM": 67, "H200 SXM": 67, "B200": 75, "RTX 5090": 104.8}.items():
        assert 2 * find_gpu(name).issue_rate / 1e12 == pytest.approx(tflops, rel=0.01), name


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_every_gpu_names_its_source(gpu: Gpu) -> None:
    assert "data sheet" in gpu.source or "white paper" in gpu.source


def test_unknown_names_list_the_known_ones() -> None:
    assert default_gpu("sm_90") is find_gpu("H100 SXM")
    assert default_gpu("gfx942") is None
    with pytest.raises(ValueError, match=r"'GTX 1'.*H100 SXM"):
        find_gpu("GTX 1")
