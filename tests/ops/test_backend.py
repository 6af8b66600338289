"""Which backend runs, and what is said when it is not the one asked for."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch

from fastddpm import ops
from fastddpm.diagnostics.step_cases import inputs, step_case
from fastddpm.errors import BackendUnavailable
from fastddpm.ops import operators as backend

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    """Decisions are cached and reasons logged once: start and end without either."""
    caches = (backend.use_triton, backend._say_once)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.fixture
def _without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n.startswith("fastddpm.kernels.")]:
        monkeypatch.delitem(sys.modules, name)
    # None in sys.modules makes an import fail, and importlib.util.find_spec too.
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


def fake_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], driver: object = mock.Mock()) -> None:
    """A GPU of this capability; ``driver`` None: Triton has none yet."""
    monkeypatch.setattr(importlib.import_module("triton.runtime.driver").driver, "_active", driver)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)


def test_backend_auto_is_the_twin_on_the_cpu_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "fastddpm"):
        for _ in range(3):
            backend.use_triton.cache_clear()
            assert not backend.use_triton("auto", CPU)
    assert [r.getMessage() for r in caplog.records] == [
        "the fused operations run in PyTorch: Triton has no CPU backend"
    ]


@pytest.mark.usefixtures("_without_triton")
def test_backend_auto_without_triton_runs_the_twin_and_gives_the_reason(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "fastddpm"):
        ops.p_sample(**inputs(step_case("clip")))
        assert not backend.use_triton("auto", CUDA)
    first, second = (r.getMessage() for r in caplog.records)
    assert "Triton is not installed" in first
    assert "Triton cannot be imported" in second


@pytest.mark.usefixtures("_without_triton")
@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
def test_backend_triton_without_triton_names_the_install(device: torch.device) -> None:
    with pytest.raises(BackendUnavailable, match=r"cannot be imported.*pip install triton.*backend='torch'"):
        backend.use_triton("triton", device)


def test_backend_triton_on_cpu_tensors_names_the_interpreter() -> None:
    pytest.importorskip("triton")
    with pytest.raises(BackendUnavailable, match=r"no CPU backend.*TRITON_INTERPRET=1"):
        ops.p_sample(**inputs(step_case("clip")), backend="triton")


def test_backend_triton_on_a_gpu_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    fake_gpu(monkeypatch, (7, 0))
    with pytest.raises(BackendUnavailable, match=r"needs compute capability 7\.5, this GPU has 7\.0"):
        backend.use_triton("triton", CUDA)
    assert not backend.use_triton("auto", CUDA)


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (9, 0), (12, 0)], ids=str)
def test_backend_takes_the_kernel_from_sm_75_on(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    pytest.importorskip("triton")
    fake_gpu(monkeypatch, capability)
    assert backend.use_triton("auto", CUDA)
    assert backend.use_triton("triton", CUDA)
    assert not backend.use_triton("torch", CUDA)


def test_backend_auto_without_a_c_compiler_is_the_twin_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """As in an image without gcc: Triton compiles its driver at the first launch."""
    build = pytest.importorskip("triton.runtime.build")

    def no_compiler(*_: object) -> str:
        raise RuntimeError("Failed to find C compiler")

    driver = importlib.import_module("triton.backends").backends["nvidia"].driver
    monkeypatch.setattr(importlib.import_module("triton.runtime.driver").driver, "_default", None)
    monkeypatch.setattr(driver, "is_active", staticmethod(lambda: True))
    monkeypatch.setattr(build, "_find_compiler", no_compiler)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_LIBCUDA_PATH", str(tmp_path))
    fake_gpu(monkeypatch, (9, 0), driver=None)
    with caplog.at_level(logging.INFO, "fastddpm"):
        assert not backend.use_triton("auto", CUDA)
    (record,) = caplog.records
    assert "Failed to find C compiler" in record.getMessage()
    assert "install a C compiler" in record.getMessage()
    with pytest.raises(BackendUnavailable, match="C compiler"):
        backend.use_triton("triton", CUDA)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_backend_without_cuda_says_what_to_install() -> None:
    pytest.importorskip("triton")
    with pytest.raises(BackendUnavailable, match="CUDA build of PyTorch"):
        backend.use_triton("triton", CUDA)


def test_backend_on_another_kind_of_device_is_the_twin() -> None:
    pytest.importorskip("triton")
    assert not backend.use_triton("auto", torch.device("meta"))
    with pytest.raises(BackendUnavailable, match="not for 'meta'"):
        backend.use_triton("triton", torch.device("meta"))


@pytest.mark.parametrize("name", ["cuda", "", "Triton"])
def test_backend_refuses_other_names(name: str) -> None:
    with pytest.raises(ValueError, match="auto, triton, torch"):
        backend.use_triton(name, CPU)


def test_kernels_refuse_to_be_imported_under_another_name() -> None:
    path = importlib.import_module("fastddpm.kernels").__file__
    with pytest.raises(ImportError, match=r"import it as 'fastddpm\.kernels'"):
        runpy.run_path(str(path), run_name="kernels")
