"""Training data: values and splits of the built-in sets, folders and arrays, and everything hostile about files."""

from __future__ import annotations

import io
import struct
import subprocess
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastddpm.cli import main
from fastddpm.data.datasets import digits8x8, mnist
from fastddpm.data.folder import image_file
from fastddpm.data.load import load_data
from fastddpm.files import arrays


def test_mnist_is_split_evenly_and_without_overlap() -> None:
    train, test = mnist("train"), mnist("test")
    assert train.images.shape == (4000, 1, 32, 32)
    assert test.images.shape == (1000, 1, 32, 32)
    for part, each in ((train, 400), (test, 100)):
        assert part.labels is not None
        assert torch.bincount(part.labels).tolist() == [each] * 10
    seen = {image.numpy().tobytes() for image in train.images}
    assert len(seen) == 4000
    assert not any(image.numpy().tobytes() in seen for image in test.images)


def test_mnist_split_never_changes() -> None:
    # The shipped model was trained on this half; the classifier and the evaluation rely on the other.
    assert mnist("train").fingerprint() == "838de0f6bf7e7d634baced986a6188dc949aaf4117a5588d0c1a01eea25edcab"
    assert mnist("test").fingerprint() == "a1b161681ec7e8466868d8b3e178ddc5f4b9b60763a1875927ba62beed885c7c"


def test_mnist_is_padded_with_background() -> None:
    x_0 = mnist("test").x_0(torch.arange(1000))
    assert x_0.dtype == torch.float32
    assert x_0.min() == -1.0
    assert x_0.max() == 1.0
    border = torch.ones(32, 32, dtype=torch.bool)
    border[2:30, 2:30] = False
    assert bool((x_0[:, :, border] == -1.0).all())


def test_digits8x8_keeps_the_seventeen_grey_levels() -> None:
    from sklearn.datasets import load_digits

    train, test = digits8x8("train"), digits8x8("test")
    assert len(train) + len(test) == 1797
    levels = torch.cat([train.images, test.images]).unique()
    assert levels.tolist() == [round(i * 255 / 16) for i in range(17)]
    assert train.labels is not None
    first = torch.nonzero(train.labels == 0).min()
    scaled = np.rint(load_digits().images * 255 / 16)
    assert (scaled == train.images[first].numpy()).all(axis=(1, 2)).any()


def test_split_refuses_an_unknown_part() -> None:
    with pytest.raises(ValueError, match="'validation'"):
        mnist("validation")  # type: ignore[arg-type]


def _write_images(folder: Path, mode: str = "L", size: tuple[int, int] = (8, 8)) -> None:
    generator = np.random.default_rng(0)
    for label in ("cat", "dog"):
        (folder / label).mkdir(parents=True)
        for i in range(3):
            shape = size[::-1] if mode == "L" else (*size[::-1], len(mode))
            Image.fromarray(generator.integers(0, 256, shape, dtype=np.uint8)).save(folder / label / f"{i}.png")


def test_folder_takes_classes_from_its_subfolders(tmp_path: Path) -> None:
    _write_images(tmp_path)
    found = load_data(str(tmp_path))
    assert found.shape == (1, 8, 8)
    assert found.classes == ("cat", "dog")
    assert found.labels is not None
    assert found.labels.tolist() == [0, 0, 0, 1, 1, 1]
    pixels = np.asarray(Image.open(tmp_path / "dog" / "1.png"))
    assert torch.equal(found.images[4, 0], torch.from_numpy(pixels.copy()))


def test_folder_without_subfolders_has_no_classes_and_one_colour_makes_all_rgb(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 7, np.uint8)).save(tmp_path / "a.png")
    Image.fromarray(np.full((4, 4, 3), (1, 2, 3), np.uint8)).save(tmp_path / "b.png")
    found = load_data(str(tmp_path))
    assert found.labels is None
    assert found.images[:, :, 0, 0].tolist() == [[7, 7, 7], [1, 2, 3]]


def test_folder_resizes_to_the_resolution_and_otherwise_names_the_odd_one_out(tmp_path: Path) -> None:
    _write_images(tmp_path, "RGB")
    Image.fromarray(np.zeros((10, 20, 3), np.uint8)).save(tmp_path / "dog" / "odd.png")
    with pytest.raises(ValueError, match=r"odd\.png is 10x20"):
        load_data(str(tmp_path))
    found = load_data(str(tmp_path), resolution=4)
    assert found.images.shape == (7, 3, 4, 4)


def test_folder_turns_images_as_their_exif_says(tmp_path: Path) -> None:
    image = Image.fromarray(np.arange(6, dtype=np.uint8).reshape(2, 3))
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise to view
    image.save(tmp_path / "a.png", exif=exif)
    assert load_data(str(tmp_path)).images[0, 0].tolist() == [[3, 0], [4, 1], [5, 2]]


def _png_claiming(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("content", "what"),
    [
        pytest.param(b"not an image", "cannot identify", id="no-image"),
        pytest.param(_png_claiming(8, 8)[:45], "not a usable image", id="truncated"),
        pytest.param(_png_claiming(50_000, 50_000), "50000x50000|exceeds limit", id="bomb"),
        pytest.param(_png_claiming(9_000, 9_000), "9000x9000", id="bomb-below-pillow's-limit"),
    ],
)
def test_folder_names_the_file_that_is_no_image(tmp_path: Path, content: bytes, what: str) -> None:
    (tmp_path / "bad.png").write_bytes(content)
    with pytest.raises(ValueError, match=rf"bad\.png: .*({what})"):
        load_data(str(tmp_path), resolution=8)


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"


@pytest.mark.parametrize(
    "load",
    [load_data, lambda source: image_file(Path(source) / "a.png", resolution=8)],
    ids=["folder", "file"],
)
def test_an_eps_file_named_png_starts_no_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load: Callable[[str], object]
) -> None:
    (tmp_path / "a.png").write_bytes(EPS)
    commands: list[object] = []
    monkeypatch.setattr(subprocess, "check_call", commands.append)
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", "gs")
    with pytest.raises(ValueError, match=r"a\.png: not a usable image: cannot identify"):
        load(str(tmp_path))
    assert commands == []


@pytest.mark.parametrize("name", ["IHDR", "IDAT"])
def test_a_png_with_a_wrong_checksum_is_refused(tmp_path: Path, name: str) -> None:
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(tmp_path / "a.png")
    content = bytearray((tmp_path / "a.png").read_bytes())
    chunk = content.index(name.encode())
    length = int.from_bytes(content[chunk - 4 : chunk], "big")
    content[chunk + 4 + length] ^= 1
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ValueError, match=rf"a\.png: not a usable image: .*(checksum in b'{name}'|cannot identify)"):
        load_data(str(tmp_path))


@pytest.mark.parametrize("name", ["a.png", "points.csv", "d.npy"])
def test_messages_about_hostile_files_are_short_and_printable(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "\x1b[2J"
    folder.mkdir()
    content = "\x1b[31m" + "x" * 100_000
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (2, 2)})
    hostile = header.getvalue().replace(b"'|u1'", b"'\x1b1'")
    (folder / name).write_bytes(hostile if name == "d.npy" else content.encode())
    data = str(folder if name == "a.png" else folder / name)
    assert main(["diffuse", "--data", data, "--outdir", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert "\x1b" not in error
    assert "\\x1b[2J" in error
    assert len(error) < 2100


def test_folder_without_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "readme.txt").write_text("hello")
    with pytest.raises(ValueError, match="holds no images"):
        load_data(str(tmp_path))


@pytest.mark.parametrize("source", ["no-such-data", "weights.pkl"])
def test_load_data_names_the_choices(source: str) -> None:
    with pytest.raises(ValueError, match="mnist, digits8x8, an image folder"):
        load_data(source)


def test_npz_reads_images_and_labels(tmp_path: Path) -> None:
    nhwc = np.random.default_rng(0).integers(0, 256, (5, 4, 6, 3), dtype=np.uint8)
    np.savez_compressed(tmp_path / "d.npz", arr_0=nhwc, arr_1=np.array([0, 2, 1, 1, 0]))
    found = load_data(str(tmp_path / "d.npz"))
    assert torch.equal(found.images, torch.from_numpy(nhwc.transpose(0, 3, 1, 2).copy()))
    assert found.labels is not None
    assert found.labels.tolist() == [0, 2, 1, 1, 0]
    assert found.classes == ("0", "1", "2")


@pytest.mark.parametrize("order", ["C", "F"])
def test_npy_reads_floats_in_either_order(tmp_path: Path, order: str) -> None:
    x = np.random.default_rng(0).uniform(-1, 1, (4, 3, 8, 6)).astype(np.float32)
    np.save(tmp_path / "d.npy", np.asarray(x, order=order))  # type: ignore[call-overload]
    found = load_data(str(tmp_path / "d.npy"))
    assert torch.equal(found.x_0(torch.arange(4)), torch.from_numpy(x))


def _npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=True)
    return stream.getvalue()


def _npy_claiming(shape: tuple[int, ...]) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return stream.getvalue() + bytes(64)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        pytest.param(_npy(np.array([{}, []], dtype=object)), "not numbers", id="pickle"),
        pytest.param(_npy_claiming((1 << 20, 1 << 10, 1 << 10, 3)), "more than", id="petabytes"),
        pytest.param(_npy_claiming((4, 8, 8)), "declares 256 bytes of data but holds 64", id="truncated"),
        pytest.param(_npy(np.zeros((4, 8, 8), np.float32) + 3), "what is black and what is white", id="range"),
        pytest.param(_npy(np.full((4, 8, 8), np.nan, np.float32)), "NaN or infinity", id="nan"),
        pytest.param(_npy(np.zeros((4, 8, 8), np.int32)), "what is black", id="integers"),
        pytest.param(_npy(np.zeros((4, 5, 8, 5), np.uint8)), "holds the channels", id="channels"),
        pytest.param(_npy(np.zeros((0, 8, 8), np.uint8)), "images must be", id="empty"),
        pytest.param(b"hello", "d.npy", id="garbage"),
    ],
)
def test_npy_refuses_what_it_cannot_use(tmp_path: Path, content: bytes, what: str) -> None:
    (tmp_path / "d.npy").write_bytes(content)
    with pytest.raises(ValueError, match=what):
        load_data(str(tmp_path / "d.npy"))


def test_npz_bomb_is_refused_by_its_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "bomb.npz"
    np.savez_compressed(path, images=np.zeros((2_000, 64, 64, 3), np.uint8))
    assert path.stat().st_size < 200_000
    monkeypatch.setattr(arrays, "MAX_DATA_BYTES", 1 << 20)
    reads: list[int] = []
    read = zipfile.ZipExtFile.read
    monkeypatch.setattr(zipfile.ZipExtFile, "read", lambda self, n=-1: reads.append(n) or read(self, n))
    with pytest.raises(ValueError, match="24576000 bytes"):
        load_data(str(path))
    assert max(reads) < 10_000


def test_npz_refuses_damage_and_wrong_names(tmp_path: Path) -> None:
    path = tmp_path / "d.npz"
    path.write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(ValueError, match=r"d\.npz: not a usable array file"):
        load_data(str(path))
    np.savez(path, a=np.zeros(3), b=np.zeros(3))
    with pytest.raises(ValueError, match="no array called images"):
        load_data(str(path))
    np.savez(path, images=np.zeros((3, 8, 8), np.uint8), labels=np.array([0, -1, 1]))
    with pytest.raises(ValueError, match="labels must be 3 integers"):
        load_data(str(path))


def test_resolution_is_for_folders() -> None:
    with pytest.raises(ValueError, match="resolution=16"):
        load_data("digits8x8", resolution=16)
