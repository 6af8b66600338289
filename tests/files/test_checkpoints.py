"""Checkpoints of torch.save: what they hold is read as it was saved, never run, and never larger than the file."""

from __future__ import annotations

import io
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from fastddpm.cli import main
from fastddpm.files.checkpoints import Checkpoint
from fastddpm.integrations.convert import convert


class Bomb:
    """Makes a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("form", ["zip", "legacy"])
@pytest.mark.parametrize("protocol", [2, 3])
def test_tensors_are_read_as_they_were_saved(tmp_path: Path, form: str, protocol: int) -> None:
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
    optimizer = torch.optim.AdamW(network.parameters())
    network(torch.randn(1, 3, 8, 8)).sum().backward()
    optimizer.step()
    halves = torch.arange(24, dtype=torch.bfloat16).reshape(4, 6)
    content = {
        "model": network.state_dict(),
        "optimizer": optimizer.state_dict(),
        "list": [{"parameter": torch.nn.Parameter(torch.randn(3))}, 1, 2.5, None, "x", b"y", torch.Size([2])],
        "views": (halves[1:3, ::2], halves.t(), torch.zeros(0, 3), torch.tensor(3.0, dtype=torch.float64)),
        0: {7: torch.full((2,), 7.0).half()},
    }
    path = tmp_path / "a.pt"
    torch.save(content, path, _use_new_zipfile_serialization=form == "zip", pickle_protocol=protocol)
    expected = {
        **{f"model.{name}": tensor for name, tensor in network.state_dict().items() if tensor.is_floating_point()},
        "optimizer.state.0.exp_avg": optimizer.state[network[0].weight]["exp_avg"],
        "list.0.parameter": content["list"][0]["parameter"].detach(),
        **{f"views.{i}": view for i, view in enumerate(content["views"])},
        "0.7": content[0][7],
    }
    got = Checkpoint(path).read(expected)
    for name, tensor in expected.items():
        assert got[name].dtype == torch.float32
        assert torch.equal(got[name], tensor.float()), name


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_a_checkpoint_with_code_is_refused_and_not_run(tmp_path: Path, form: str, capsys: Any) -> None:
    payload = {"model": {"conv_in.weight": torch.zeros(1)}, "extra": Bomb(tmp_path / "ran")}
    path = tmp_path / "model.pt"
    if form == "pickle":
        path.write_bytes(pickle.dumps({"extra": Bomb(tmp_path / "ran")}))
    else:
        torch.save(payload, path, _use_new_zipfile_serialization=form == "zip")
    assert main(["convert", str(path), str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert str(path) in error
    assert "refused" in error or form == "pickle"
    # torch's own advice would open the hole.
    assert "weights_only" not in error
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "out").exists()


def test_the_environment_cannot_force_unpickling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    torch.save({"extra": Bomb(tmp_path / "ran")}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="refused"):
        convert(tmp_path / "model.pt", tmp_path / "out")
    assert not (tmp_path / "ran").exists()
    # The danger is real: a plain torch.load, which reads the variable, runs what is in the file (here: makes another).
    with pytest.warns(UserWarning, match="TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"):
        torch.load(tmp_path / "model.pt")
    assert (tmp_path / "ran").exists()


def legacy(content: Any) -> bytes:
    """A file in torch's older format."""
    stream = io.BytesIO()
    torch.save(content, stream, _use_new_zipfile_serialization=False)
    return stream.getvalue()


def rewrite(path: Path, change: Any) -> None:
    """Write a zip checkpoint anew with every entry as `change(name, content)` returns it."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, change(name, content))


def test_damaged_and_hostile_archives_are_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(100)}, tmp_path / "good.pt")
    good = (tmp_path / "good.pt").read_bytes()
    (tmp_path / "truncated.pt").write_bytes(good[:300])
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "text.pt").write_text("not a checkpoint")
    torch.save({"a": torch.zeros(1).expand(10**12)}, tmp_path / "huge.pt")
    data = good.index(bytes(400))
    (tmp_path / "flipped.pt").write_bytes(good[:data] + b"\1" + good[data + 1 :])
    for name, entry, kind in (
        ("climbs.pt", "../../evil", zipfile.ZIP_STORED),
        ("absolute.pt", "/etc/evil", zipfile.ZIP_STORED),
        ("bomb.pt", "archive/data/0", zipfile.ZIP_DEFLATED),
    ):
        with zipfile.ZipFile(tmp_path / name, "w", kind) as archive:
            archive.writestr("archive/data.pkl", b"")
            archive.writestr(entry, bytes(10**6))
    cases = {
        "truncated.pt": "no usable checkpoint",
        "empty.pt": "no usable checkpoint",
        "text.pt": "no usable checkpoint",
        "huge.pt": "1 tensors of 4000000000000 bytes in a file of",
        "flipped.pt": "Bad CRC-32",
        "climbs.pt": "points outside the archive",
        "absolute.pt": "points outside the archive",
        "bomb.pt": "compressed",
    }
    for name, message in cases.items():
        with pytest.raises(ValueError, match=message) as caught:
            Checkpoint(tmp_path / name).read(["a"])
        assert name in str(caught.value)
    with pytest.raises(FileNotFoundError):
        Checkpoint(tmp_path / "absent.pt")
    for path in (Path("/dev/zero"), tmp_path):
        with pytest.raises(ValueError, match="not a regular file"):
            Checkpoint(path)


def test_storages_that_are_shorter_than_claimed_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save({"a": torch.zeros(100)}, path)
    rewrite(path, lambda name, content: content[:-4] if name.endswith("data/0") else content)
    with pytest.raises(ValueError, match="storage '0' claims 400 bytes, and 396 are stored"):
        Checkpoint(path)
    whole = legacy({"a": torch.zeros(100)})
    path.write_bytes(whole[:-4])
    with pytest.raises(ValueError, match="claims 100 numbers, and fewer are stored"):
        Checkpoint(path)
    # The list of stored keys emptied: the storage is claimed and never stored.
    keys = whole.index(pickle.dumps([], protocol=2)[:3] + b"q\x00", whole.index(b"FloatStorage") + 60)
    path.write_bytes(whole[:keys] + pickle.dumps([], protocol=2))
    with pytest.raises(ValueError, match="1 storages are claimed, and others are stored"):
        Checkpoint(path)


@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_many_names_for_the_same_numbers_are_listed_and_not_read(tmp_path: Path, form: str) -> None:
    numbers = torch.zeros(1 << 20)
    content = {f"a{i}": numbers for i in range(1000)}
    torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=form == "zip")
    checkpoint = Checkpoint(tmp_path / "a.pt")
    assert len(checkpoint.tensors) == 1000
    with pytest.raises(ValueError, match="1000 tensors of 4194304000 bytes in a file of 4"):
        checkpoint.read(checkpoint.tensors)


def legacy_claiming(length: int) -> bytes:
    """A file of 77 numbers whose pickle and whose storage both claim more."""
    content = legacy({"a": torch.zeros(77)}).replace(b"K\x4d", b"\x8a\x05" + struct.pack("<Q", length)[:5])
    return content[: -8 - 4 * 77] + struct.pack("<Q", length) + bytes(4 * 77)


CLAIMS = {
    "storage": legacy_claiming(1 << 30),
    "memo": b"\x80\x02N" + b"r" + struct.pack("<I", 1 << 31) + b".",
    "bytes": b"\x80\x05\x96" + struct.pack("<Q", 1 << 36) + b".",
    "text": b"\x80\x02X" + struct.pack("<I", 1 << 31) + b"a.",
    "nested-key": b"\x80\x02}" + b")" + b"\x85" * 200_000 + b"Ns.",
}


def test_small_files_that_claim_gigabytes_take_none(tmp_path: Path) -> None:
    for claim, content in CLAIMS.items():
        (tmp_path / claim).write_bytes(content)
    script = (
        "import resource, sys; from pathlib import Path; from fastddpm.files.checkpoints import Checkpoint\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "for path in sys.argv[1:]:\n"
        "    try: Checkpoint(Path(path)).read(['a'])\n"
        "    except ValueError: print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    command = [sys.executable, "-c", script, *(str(tmp_path / claim) for claim in CLAIMS)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    taken = dict(zip(CLAIMS, map(int, done.stdout.split()), strict=True))
    assert max(taken.values()) < 100_000, taken  # kB


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor", "ignore:The PyTorch API of nested tensors")
def test_only_dense_real_floating_point_tensors_are_read(tmp_path: Path) -> None:
    tensors = {
        "sparse": torch.eye(3).to_sparse(),
        "quantised": torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.quint8),
        "meta": torch.empty(3, device="meta"),
        "nested": torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
        "complex": torch.zeros(2, dtype=torch.complex64),
        "float8": torch.zeros(2).to(torch.float8_e4m3fn),
        "integer": torch.zeros(2, dtype=torch.int64),
    }
    torch.save({**tensors, "good": torch.ones(2)}, tmp_path / "a.pt")
    checkpoint = Checkpoint(tmp_path / "a.pt")
    assert torch.equal(checkpoint.read(["good"])["good"], torch.ones(2))
    for name in tensors:
        with pytest.raises(ValueError, match=f"'{name}' is .*, not a dense tensor of real floating point numbers"):
            checkpoint.read([name])


def test_a_message_about_a_hostile_name_is_short_and_printable(tmp_path: Path) -> None:
    torch.save({"\x1b[2J" + "x" * 400: torch.zeros(1)}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"\\x1b\[2Jxxx") as caught:
        convert(tmp_path / "a.pt", tmp_path / "out")
    assert "\x1b" not in str(caught.value)
    assert len(str(caught.value)) < 1000
    torch.save({"y" * 500_000: torch.zeros(1)}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="names of more than") as caught:
        convert(tmp_path / "a.pt", tmp_path / "out")
    assert len(str(caught.value)) < 1000
