"""A sampler's options: what is noted about the machine they ask for."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fastddpm.machine import hardware
from fastddpm.sampling import options

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    """Notes are logged once: start and end without any."""
    options.note_emulation.cache_clear()
    yield
    options.note_emulation.cache_clear()


@pytest.mark.parametrize(
    ("dtype", "capability", "said"),
    [
        (torch.bfloat16, (7, 5), 1),
        (torch.bfloat16, (8, 0), 0),
        (torch.float16, (7, 5), 0),
        (torch.float32, (7, 5), 0),
    ],
    ids=str,
)
def test_bfloat16_on_a_gpu_without_it_is_noted_once(
    dtype: torch.dtype,
    capability: tuple[int, int],
    said: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    for _ in range(2):
        options.note_emulation(dtype, CUDA)
    assert len(caplog.records) == said
    assert "cuda:0 has compute capability 7.5" in caplog.text or not said


@pytest.mark.parametrize(
    ("flags", "native", "said"), [(["avx2"], False, True), (["avx512_bf16"], True, False), ([], False, False)]
)
def test_bfloat16_on_a_processor_without_it_is_noted(
    flags: list[str],
    native: bool,
    said: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(hardware, "cpu", lambda: {"flags": flags, "native_bfloat16": native})
    options.note_emulation.cache_clear()
    options.note_emulation(torch.bfloat16, CPU)
    options.note_emulation(torch.float16, CPU)
    assert [r.getMessage() for r in caplog.records] == [
        "this processor emulates bfloat16, slowly: use dtype=torch.float32"
    ][: int(said)]
