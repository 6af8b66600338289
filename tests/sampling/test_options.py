"""What a sampler decides for itself, and what it notes in the log."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from fastddpm.machine import hardware, torch_compile
from fastddpm.machine.building import Want
from fastddpm.sampling.options import REPAYS_AFTER, decide_compile, decide_graph, note_emulation, weight_uses

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
SHAPE = (3, 8, 8)


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    """Reasons are logged once: start and end without any."""
    note_emulation.cache_clear()
    yield
    note_emulation.cache_clear()


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
        note_emulation(dtype, CUDA)
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
    note_emulation(torch.bfloat16, CPU)
    note_emulation(torch.float16, CPU)
    assert [r.getMessage() for r in caplog.records] == [
        "this processor emulates bfloat16, slowly: use dtype=torch.float32"
    ][: int(said)]


def test_compile_auto_on_a_cpu_weighs_the_work_ahead(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    model = nn.Linear(9, 11)
    enough = math.ceil(REPAYS_AFTER / (110 * 64))
    monkeypatch.setattr(torch_compile, "has_cpp_compiler", lambda: True)
    assert decide_compile("auto", CPU, model, SHAPE, enough - 1) is Want.FOR_LATER
    assert "runs uncompiled until" in caplog.text
    caplog.clear()
    assert decide_compile("auto", CPU, model, SHAPE, enough) is Want.NOW
    assert "runs compiled" in caplog.text
    assert decide_compile("auto", CPU, model, SHAPE, enough // 100) is Want.IF_FOUND
    assert decide_compile("auto", CPU, model, SHAPE, 1) is Want.NEVER
    monkeypatch.setattr(torch_compile, "has_cpp_compiler", lambda: False)
    assert decide_compile("auto", CPU, model, SHAPE, enough) is Want.IF_FOUND
    assert "no C++ compiler" in caplog.text
    assert decide_compile(True, CPU, model, SHAPE, 0) is Want.NOW
    assert decide_compile(False, CPU, model, SHAPE, 10**18) is Want.NEVER
    assert weight_uses(lambda x, t: x, SHAPE) == 0


@pytest.mark.parametrize(("mode", "captured"), [("default", True), ("reduce-overhead", False), ("max-autotune", False)])
def test_graph_auto_leaves_models_that_replay_their_own_alone(mode: str, captured: bool) -> None:
    net = nn.Linear(2, 2)
    compiled = torch.compile(net, mode=mode)
    for model in (compiled, nn.Sequential(compiled), torch.compile(net.forward, mode=mode), lambda x, t: compiled(x)):
        assert decide_graph("auto", CUDA, model) == captured


def test_compile_auto_on_cuda_needs_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    for installed in (True, False):
        monkeypatch.setattr(torch_compile, "has_triton", lambda installed=installed: installed)
        decided = decide_compile("auto", CUDA, nn.Linear(9, 11), SHAPE, 1)
        assert decided is (Want.NOW if installed else Want.NEVER)
