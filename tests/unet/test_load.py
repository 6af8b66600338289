"""Which folder and files `load` takes: names, links, other solvers, and never half a model."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path

import pytest
import torch

import fastddpm.unet.load
from fastddpm.files.atomic import write_files
from fastddpm.unet.load import load
from fastddpm.unet.save import save_pretrained
from fastddpm.unet.unet import UNet
from tests.unet.model_folders import (
    assert_same_weights,
)


def test_load_lists_shipped_models_for_an_unknown_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("numbers", "letters"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    monkeypatch.setattr(fastddpm.unet.load, "SHIPPED", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"'faces'.*shipped models: letters, numbers"):
        load("faces")


def test_load_finds_a_shipped_model_by_name(model: UNet, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastddpm.unet.load, "SHIPPED", folder.parent)
    assert_same_weights(load(folder.name), model)


def test_load_names_what_a_folder_lacks(folder: Path, tmp_path: Path) -> None:
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no diffusion_pytorch_model\.safetensors"):
        load(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        load(tmp_path / "empty")
    with pytest.raises(ValueError, match="not a folder"):
        load(folder / "config.json")


@pytest.mark.parametrize("name", ["config.json", "scheduler_config.json", "diffusion_pytorch_model.safetensors"])
def test_load_refuses_links_out_of_the_folder(folder: Path, tmp_path: Path, name: str) -> None:
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=f"{name}: links to .*elsewhere"):
        load(folder)


def test_load_refuses_a_linked_unet_folder(model: UNet, tmp_path: Path) -> None:
    save_pretrained(model, tmp_path / "pipeline", layout="pipeline")
    (tmp_path / "pipeline" / "unet").rename(tmp_path / "elsewhere")
    (tmp_path / "pipeline" / "unet").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="links to"):
        load(tmp_path / "pipeline")


def test_load_follows_links_inside_the_folder_and_in_the_hub_cache(model: UNet, folder: Path, tmp_path: Path) -> None:
    (folder / "diffusion_pytorch_model.safetensors").rename(folder / "v1.safetensors")
    (folder / "diffusion_pytorch_model.safetensors").symlink_to("v1.safetensors")
    assert_same_weights(load(folder), model)
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0123", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for name in ("config.json", "scheduler_config.json"):
        (folder / name).rename(blobs / name)
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    (folder / "v1.safetensors").rename(blobs / "cafe")
    (snapshot / "diffusion_pytorch_model.safetensors").symlink_to("../../blobs/cafe")
    assert_same_weights(load(snapshot), model)


def test_load_reads_no_path_from_model_index(model: UNet, tmp_path: Path) -> None:
    save_pretrained(model, tmp_path / "pipeline", layout="pipeline")
    index = {"_class_name": "os.system", "unet": ["../../evil", "Net"], "scheduler": ["/etc", "passwd"]}
    (tmp_path / "pipeline" / "model_index.json").write_text(json.dumps(index))
    assert_same_weights(load(tmp_path / "pipeline"), model)


def test_write_files_leaves_old_files_when_the_disk_is_full(
    model: UNet, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    synced = []

    def fail_on_the_second(handle: int) -> None:
        synced.append(handle)
        if len(synced) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail_on_the_second)
    with torch.no_grad():
        model.conv_in.weight.mul_(2)
    with pytest.raises(OSError, match="No space left"):
        save_pretrained(model, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("moved", [0, 1, 2])
def test_load_never_takes_a_half_replaced_model_for_a_whole_one(
    model: UNet, folder: Path, monkeypatch: pytest.MonkeyPatch, moved: int
) -> None:
    """Killed after `moved` of three files: the old model, or an error about the pair, never a mixture."""
    old = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        model.conv_in.weight.mul_(2)
    replace, count = os.replace, []

    def killed(source: Path, target: Path) -> None:
        if len(count) == moved:
            raise KeyboardInterrupt
        count.append(target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        save_pretrained(model, folder)
    if moved == 0:
        assert all(torch.equal(tensor, old[name]) for name, tensor in load(folder).state_dict().items())
    else:
        with pytest.raises(ValueError, match="SHA-256"):
            load(folder)


def test_write_files_ignores_leftovers_of_a_killed_process(tmp_path: Path) -> None:
    leftover = tmp_path / f".a.{os.getpid()}.tmp"
    leftover.write_bytes(b"half")
    write_files({tmp_path / "a": b"whole"})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a": b"whole"}


def test_load_of_a_sound_folder_warns_of_nothing(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(folder)
