"""Caches of compiled code that are damaged, cannot be made, or belong to others."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastddpm.diagnostics import compile_offline as offline
from fastddpm.diagnostics.variants import noise_variant
from fastddpm.errors import BackendUnavailable
from fastddpm.machine import building, torch_compile
from fastddpm.machine.building import Want
from fastddpm.sampling.options import decide_compile

COMPILES = """
import torch
from fastddpm.machine.torch_compile import compile_call

call = compile_call(lambda x: x.cos() + 1, strict={strict})
print([call(torch.zeros(8)).sum().item() for _ in range(2)])
"""


def compile_without_home(temporary: Path, *, strict: bool) -> subprocess.CompletedProcess[str]:
    """Compile and call in a process that knows no user, whose caches lie in a folder for temporary files."""
    names = ("HOME", "USER", "LOGNAME", "TORCHINDUCTOR_CACHE_DIR")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    # One small kernel is soonest compiled without headers compiled in advance, and without trying vector instructions.
    environment |= {"TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS": "0", "TORCHINDUCTOR_VEC_ISA_OK": "0"}
    environment["TMPDIR"] = str(temporary)
    command = [sys.executable, "-c", COMPILES.format(strict=strict)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def damage(folder: Path) -> None:
    """Cut every file in half."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    for path in files:
        os.truncate(path, path.stat().st_size // 2)


def test_compiling_needs_no_home_and_damaged_code_is_a_warning_that_names_the_cache(tmp_path: Path) -> None:
    found = compile_without_home(tmp_path, strict=True)
    assert found.stdout == "[16.0, 16.0]\n", found.stderr
    (cache,) = tmp_path.glob("torchinductor_*")
    damage(cache)
    found = compile_without_home(tmp_path, strict=False)
    assert found.stdout == "[16.0, 16.0]\n"
    # Some versions of torch compile again.
    failures = found.stderr.count("runs uncompiled: torch.compile failed: ")
    advice = f"if {cache} is damaged, remove it or set TORCHINDUCTOR_CACHE_DIR to another folder"
    assert failures == found.stderr.count(advice) <= 1


def test_damaged_code_of_triton_is_compiled_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    launch = noise_variant("float32", (2, 64)).launch
    first = offline.compile_launch(launch, "sm_90")
    damage(tmp_path)
    assert offline.compile_launch(launch, "sm_90") == first


def test_compile_refuses_a_cache_that_cannot_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(file / "cache"))
    caplog.set_level("INFO")
    cpu, model = torch.device("cpu"), torch.nn.Linear(100, 100)
    assert decide_compile("auto", cpu, model, (1, 64, 64), 10**9) is Want.IF_FOUND
    assert "set TORCHINDUCTOR_CACHE_DIR" in caplog.text
    with pytest.raises(BackendUnavailable, match="set TORCHINDUCTOR_CACHE_DIR"):
        decide_compile(True, cpu, model, (1, 64, 64), 1)


def test_cache_of_another_user_is_one_that_others_can_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a shared temporary folder anybody can take the name first."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    tmp_path.chmod(0o755)
    assert torch_compile.triton_cache().open_part is None
    monkeypatch.setattr("os.geteuid", lambda: tmp_path.stat().st_uid + 1)
    assert torch_compile.triton_cache().open_part == tmp_path


def test_cache_is_open_where_others_can_put_another_in_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    above, cache, elsewhere = tmp_path / "above", tmp_path / "above" / "mine" / "cache", tmp_path / "private"
    cache.mkdir(parents=True, mode=0o700)
    elsewhere.mkdir(mode=0o700)
    (above / "link").symlink_to(elsewhere)
    places = (cache, above / "mine" / "not-yet", above / "link", above / "link" / "not-yet")
    for mode, found in ((0o755, None), (0o777, above), (0o775, above), (0o1777, None)):
        above.chmod(mode)
        for place in places:
            monkeypatch.setenv("FASTDDPM_CACHE_DIR", str(place))
            assert torch_compile.package_cache().open_part == found
            reason = building.why_not() or ""
            assert (f"others can write to {above}: set FASTDDPM_CACHE_DIR to a folder of yours" in reason) == bool(
                found
            )
    monkeypatch.setenv("FASTDDPM_CACHE_DIR", str(cache))
    me = os.geteuid()
    monkeypatch.setattr("os.geteuid", lambda: me + 1)
    assert torch_compile.package_cache().open_part == cache


def test_caches_do_not_need_home(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOME", "USER", "LOGNAME", "TRITON_CACHE_DIR", "TRITON_HOME", "TORCHINDUCTOR_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    assert torch_compile.inductor_cache().path.is_absolute()
    assert torch_compile.triton_cache().path.is_absolute()
