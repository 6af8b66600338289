"""Models of the Hugging Face Hub: from a cache laid out by hand, without a network."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from fastddpm.cli import main
from fastddpm.unet.load import load
from fastddpm.unet.save import save_pretrained
from fastddpm.unet.unet import UNet, UNetConfig

hub = pytest.importorskip("huggingface_hub")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with one model, as huggingface_hub lays it out: snapshots that link to blobs."""
    torch.manual_seed(0)
    config = UNetConfig(
        sample_size=8,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        layers_per_block=1,
        norm_num_groups=4,
    )
    save_pretrained(UNet(config, zero_init=False), tmp_path / "model")
    repository = tmp_path / "hub" / "models--someone--tiny.model"
    snapshot = repository / "snapshots" / COMMIT
    for folder in (repository / "blobs", repository / "refs", snapshot):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    for i, path in enumerate(sorted((tmp_path / "model").iterdir())):
        path.rename(repository / "blobs" / f"{i}")
        (snapshot / path.name).symlink_to(f"../../blobs/{i}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return snapshot


@pytest.mark.parametrize("revision", [None, "main", COMMIT])
def test_a_model_is_loaded_by_its_id_from_the_cache(cache: Path, revision: str | None) -> None:
    weights = load(cache).state_dict()
    named = "someone/tiny.model" if revision is None else f"someone/tiny.model@{revision}"
    for model in (load("someone/tiny.model", revision=revision), load(named)):
        assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_the_command_line_takes_an_id(cache: Path, tmp_path: Path) -> None:
    arguments = ["--model", "someone/tiny.model", "--seeds", "0", "--steps", "2", "--compile", "off", "--quiet"]
    assert main(["sample", *arguments, "--outdir", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "seed-000000.png").is_file()


def test_a_model_that_is_not_there_names_the_command_that_gets_it(cache: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such folder, .*hf download someone/other --local-dir DIR"):
        load("someone/other")
    with pytest.raises(FileNotFoundError, match=r"hf download someone/tiny\.model --revision v2 --local-dir DIR"):
        load("someone/tiny.model", revision="v2")
    with pytest.raises(ValueError, match="another"):
        load("someone/tiny.model@main", revision="v2")
    with pytest.raises(ValueError, match="'digits' is none"):
        load("digits", revision="v2")


def test_without_huggingface_hub_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"pip install 'fastddpm\[hub\]'; .*hf download someone/tiny"):
        load("someone/tiny")


def test_a_mistaken_path_is_not_looked_up(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    monkeypatch.setattr(hub, "snapshot_download", lambda *args, **options: pytest.fail("looked up"))
    with pytest.raises(FileNotFoundError, match="no folder 'runs/digits'"):
        load("runs/digits")
