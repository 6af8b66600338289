"""The folder of a run: what may be written to, completed or replaced, and what a killed process leaves."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from fastddpm.files.run_folder import RunFolder

CONFIG: dict[str, Any] = {"steps": 10, "seeds": "0-3", "noise": "noise-v1"}
NAME = "manifest.json"


def begin(path: Path, config: dict[str, Any] = CONFIG, **how: bool) -> RunFolder:
    folder = RunFolder(path, ["*.png", "raw/x.bin"])
    folder.begin(config, **{"resume": False, "overwrite": False, **how})
    return folder


def test_manifest_is_read_back(tmp_path: Path) -> None:
    content = begin(tmp_path).read()
    assert content is not None
    assert content["config"] == CONFIG
    assert RunFolder(tmp_path / "other", []).read() is None


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"format": "other"}', b'{"config": {"steps": NaN}}'])
def test_manifest_that_is_damaged_is_refused(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / NAME).write_bytes(damage)
    with pytest.raises(ValueError, match=NAME):
        begin(tmp_path, resume=True)


def test_manifest_that_was_edited_is_refused(tmp_path: Path) -> None:
    begin(tmp_path)
    path = tmp_path / NAME
    path.write_text(path.read_text().replace('"steps": 10', '"steps": 11'))
    with pytest.raises(ValueError, match="damaged"):
        begin(tmp_path, resume=True)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_manifest_that_is_a_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / NAME)
    with pytest.raises(ValueError, match="not a regular file"):
        begin(tmp_path, resume=True)


def test_begin_refuses_existing_outputs(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    (tmp_path / "notes.txt").touch()
    with pytest.raises(FileExistsError, match=r"a\.png exists already"):
        begin(tmp_path)
    with pytest.raises(ValueError, match=r"no manifest\.json"):
        begin(tmp_path, resume=True)
    begin(tmp_path, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == [NAME, "notes.txt"]


def test_begin_refuses_another_config_by_name(tmp_path: Path) -> None:
    begin(tmp_path)
    begin(tmp_path, resume=True)
    with pytest.raises(ValueError, match="other was absent and is 1; steps was 10 and is 20"):
        begin(tmp_path, {**CONFIG, "steps": 20, "other": 1}, resume=True)
    with pytest.raises(ValueError, match="noise was 'noise-v1' and is 'noise-v2'"):
        begin(tmp_path, {**CONFIG, "noise": "noise-v2"}, resume=True)


def test_begin_accepts_a_manifest_without_files(tmp_path: Path) -> None:
    begin(tmp_path)
    begin(tmp_path, {**CONFIG, "steps": 20})


def test_begin_removes_what_killed_processes_left(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    left = [".a.png.1.tmp", f".{NAME}.22.tmp", "raw/.x.bin.3.tmp"]
    for name in (*left, ".notes.txt.1.tmp"):
        (tmp_path / name).touch()
    begin(tmp_path)
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == [".notes.txt.1.tmp", NAME]


def test_locked_keeps_other_runs_out_and_leaves_no_empty_folder(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "a" / "b", [])
    with folder.locked():
        with pytest.raises(BlockingIOError, match="another run is writing"), RunFolder(folder.path, []).locked():
            pass
        with pytest.raises(BlockingIOError), RunFolder(folder.path, []).locked(shared=True):
            pass
    assert not folder.path.exists()
    (tmp_path / "file").touch()
    with (
        pytest.raises(NotADirectoryError, match="file is a file; give another --outdir"),
        RunFolder(tmp_path / "file", []).locked(),
    ):
        pass


def test_locked_lets_processes_of_one_run_share_the_folder(tmp_path: Path) -> None:
    first, second, other = (RunFolder(tmp_path, []) for _ in range(3))
    with first.locked() as share:
        share()
        with second.locked(shared=True), pytest.raises(BlockingIOError), other.locked():
            pass
    with second.locked(shared=True), pytest.raises(BlockingIOError, match="another run is writing"), other.locked():
        pass
    with other.locked():
        assert tmp_path.exists()


def test_folder_that_cannot_be_locked_is_used_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fcntl = pytest.importorskip("fcntl")

    def flock(handle: int, kind: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)
    with RunFolder(tmp_path, []).locked():
        assert f"{tmp_path} cannot be locked (Function not implemented)" in caplog.text
