"""Images: 8-bit values, grids, files; lists of seeds as text."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fastddpm.files import images
from fastddpm.noise.seeds import format_seeds, parse_seeds


def test_to_uint8_matches_diffusers() -> None:
    from diffusers.image_processor import VaeImageProcessor

    x = torch.cat([torch.linspace(-1.3, 1.3, 999), torch.tensor([-1.0, 0.0, 1.0, 1 / 255, 3 / 255])]).reshape(1, 4, -1)
    x = x[:, :, None].expand(1, 4, 1, x.shape[2])[:, :3].contiguous()
    expected = VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy((x / 2 + 0.5).clamp(0, 1)))[0]
    assert torch.equal(images.to_uint8(x)[0].permute(1, 2, 0), torch.from_numpy(np.array(expected)))


def test_to_uint8_maps_the_ends_and_what_lies_beyond() -> None:
    x = torch.tensor([-1.0, 1.0, -7.0, 7.0, 0.0, float("inf"), -float("inf"), float("nan")])
    assert images.to_uint8(x).tolist() == [0, 255, 0, 255, 128, 255, 0, 0]
    assert images.to_uint8(torch.tensor([0, 7, 255], dtype=torch.uint8)).tolist() == [0, 7, 255]


def test_save_grid_says_that_an_image_is_nan(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    images.save_grid(torch.full((1, 1, 2, 2), -1.0), tmp_path / "black.png")
    assert caplog.text == ""
    images.save_grid(torch.full((1, 1, 2, 2), float("nan")), tmp_path / "nan.png")
    assert "NaN is drawn black" in caplog.text


def test_make_grid_places_every_image() -> None:
    batch = torch.arange(1, 6, dtype=torch.uint8).reshape(5, 1, 1, 1).expand(5, 1, 2, 3)
    grid = images.make_grid(batch, columns=2, gap=1)
    assert grid.shape == (1, 3 * 3 + 1, 2 * 4 + 1)
    for i in range(5):
        top, left = 1 + i // 2 * 3, 1 + i % 2 * 4
        assert (grid[0, top : top + 2, left : left + 3] == i + 1).all()
    assert int(grid.sum()) == int(batch.sum())


@pytest.mark.parametrize("shape", [(0, 1, 2, 2), (2, 2), (3, 4, 4)])
def test_make_grid_refuses_what_is_no_batch_of_images(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="a grid needs images"):
        images.make_grid(torch.zeros(shape, dtype=torch.uint8))


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_save_png_round_trips(tmp_path: Path, channels: int) -> None:
    image = torch.randint(0, 256, (channels, 5, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images.save_png(tmp_path / "a.png", image)
    with Image.open(tmp_path / "a.png") as png:
        read = torch.from_numpy(np.array(png)).reshape(5, 7, channels).permute(2, 0, 1)
    assert torch.equal(read, image)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_join_npz_writes_what_one_save_of_all_writes(tmp_path: Path) -> None:
    x, seeds = np.random.default_rng(0).normal(size=(7, 1, 3, 2)).astype(np.float32), np.arange(7, dtype=np.uint64)
    parts = [tmp_path / f"{i}.npz" for i in range(3)]
    for part, k in zip(parts, np.split(np.arange(7), [3, 5]), strict=True):
        images.save_npz(part, x=x[k], seeds=seeds[k])
    images.join_npz(tmp_path / "joined.npz", parts)
    # NumPy's own, of all at once.
    np.savez(tmp_path / "whole.npz", x=x, seeds=seeds)
    assert (tmp_path / "joined.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()


@pytest.mark.parametrize("image", [torch.zeros(2, 4, 4, dtype=torch.uint8), torch.zeros(3, 4, 4), torch.zeros(4, 4)])
def test_save_png_refuses_what_is_no_image(tmp_path: Path, image: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="a PNG needs uint8"):
        images.save_png(tmp_path / "a.png", image)
    assert not list(tmp_path.iterdir())


def test_save_npz_writes_equal_bytes_for_equal_arrays(tmp_path: Path) -> None:
    for name in ("a.npz", "b.npz"):
        images.save_npz(tmp_path / name, x=np.arange(6.0), seeds=np.array([3], dtype=np.uint64))
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    with np.load(tmp_path / "a.npz") as arrays:
        assert arrays["x"].tolist() == [0, 1, 2, 3, 4, 5]
        assert arrays["seeds"].tolist() == [3]


def test_save_png_on_a_full_disk_keeps_the_previous_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    images.save_png(path, torch.zeros(1, 2, 2, dtype=torch.uint8))
    before = path.read_bytes()

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        images.save_png(path, torch.ones(1, 2, 2, dtype=torch.uint8))
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize(
    ("text", "seeds"),
    [
        ("7", [7]),
        ("0-3,20", [0, 1, 2, 3, 20]),
        ("5,3,3", [5, 3, 3]),
        (f"{2**64 - 1}", [2**64 - 1]),
        ("4-4", [4]),
    ],
)
def test_parse_seeds_reads(text: str, seeds: list[int]) -> None:
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize("text", ["", "a", "-1", "1-", "3-1", "1.5", "1,,2", f"{2**64}", "0-99999999999", "²"])
def test_parse_seeds_refuses(text: str) -> None:
    with pytest.raises(ValueError, match=r"seed|range"):
        parse_seeds(text)


@given(st.lists(st.integers(0, 40), min_size=1))
def test_format_seeds_is_read_back(seeds: list[int]) -> None:
    assert parse_seeds(format_seeds(seeds)) == seeds
