"""``fastddpm env`` and the facts it prints."""

from __future__ import annotations

import copy
import json
import sys
import types
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from fastddpm.cli import env, main
from fastddpm.diagnostics import environment
from fastddpm.machine import hardware as machine
from fastddpm.machine import torch_compile


@pytest.fixture(scope="module")
def facts() -> dict[str, Any]:
    return environment.facts()


def test_env_json_is_machine_facts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["versions"]["torch"] == torch.__version__
    assert printed["threads"]["intra_op"] == torch.get_num_threads()
    assert printed["cuda"]["available"] == torch.cuda.is_available()


def test_env_says_which_backend_and_why(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env"]) == 0
    text = capsys.readouterr().out
    assert "fused ops, cpu" in text
    assert "backend='auto' takes torch" in text
    assert "Triton" in text


def test_env_fits_80_columns(facts: dict[str, Any]) -> None:
    facts = copy.deepcopy(facts)
    facts["environment"]["allocator"] = {"GLIBC_TUNABLES": "glibc.malloc.arena_max=1 " * 4}
    found = {"available": True, "build": "13.0", "reason": None, "devices": [device()], "tf32_convolutions": True}
    facts["cuda"] = found
    paths = {line for line in env.render(facts).splitlines() if len(line) > env.WIDTH and "/" not in line}
    assert paths == set()


def device() -> dict[str, Any]:
    return {
        "index": 0,
        "name": "NVIDIA H100 80GB HBM3",
        "capability": "9.0",
        "processors": 132,
        "memory_gib": 79.1,
        "l2_mib": 50.0,
        "sm_clock_mhz": 1980,
        "max_sm_clock_mhz": 1980,
        "driver": "580.1",
    }


def caches_of(text: str) -> str:
    """The lines on caches, unwrapped."""
    return " ".join(text[text.index("TRITON_CACHE_DIR") :].split())


def test_env_warns_of_a_cache_that_others_can_write(
    tmp_path: Path, facts: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for mode, warned in ((0o777, True), (0o700, False)):
        tmp_path.chmod(mode)
        assert (torch_compile.triton_cache().open_part == tmp_path) == warned
        changed = facts | {"compiles": environment.compiles()}
        assert ("OTHERS CAN WRITE to it, and its code is executed" in caches_of(env.render(changed))) == warned


@pytest.mark.parametrize("variable", ["TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"])
def test_cache_that_cannot_be_made_names_its_variable(
    variable: str, tmp_path: Path, facts: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv(variable, str(file / "cache"))
    assert f"set {variable} to a folder of yours" in caches_of(env.render(facts | {"compiles": environment.compiles()}))
    look = torch_compile.triton_cache if variable == "TRITON_CACHE_DIR" else torch_compile.inductor_cache
    assert f"set {variable} to a folder that can be written" in (look().why_unusable() or "")


def test_versions_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "PACKAGES", ("torch", "no-such-distribution"))
    found = machine.versions()
    assert found["no-such-distribution"] is None
    assert found["torch"] == torch.__version__


def test_clocks_are_empty_where_nvml_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = types.ModuleType("pynvml")

    def fail() -> None:
        raise RuntimeError("driver not loaded")

    broken.nvmlInit = fail  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pynvml", broken)
    assert machine.clocks(0) == {}


def test_clocks_are_those_of_the_gpu_that_pytorch_means(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = mock.MagicMock()
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: types.SimpleNamespace(uuid=f"00-{index}"))
    assert machine.clocks(1)["sm_clock_mhz"] is nvml.nvmlDeviceGetClockInfo.return_value
    nvml.nvmlDeviceGetHandleByUUID.assert_called_once_with("GPU-00-1")


@pytest.mark.parametrize(
    ("content", "cores"), [("max 100000", None), ("150000 100000", 1.5), (None, None)], ids=["no-limit", "1.5", "none"]
)
def test_cpu_reads_the_containers_quota(
    content: str | None, cores: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "_read", lambda path: content)
    assert machine._cgroup_quota() == cores


def test_summary_names_the_machine(facts: dict[str, Any]) -> None:
    line = environment.summary(facts)
    assert facts["cpu"]["model"] in line
    assert f"torch {torch.__version__}" in line
