"""Depth, range and channels of training images: the numbers of the file by NumPy, or a question; nothing in silence."""

from __future__ import annotations

import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastddpm.data.load import load_data
from fastddpm.evaluation.real_images import load_reference
from fastddpm.training.config import TrainConfig

GREY16 = np.array([[0, 1, 255], [256, 40_000, 65_535]], dtype=np.uint16)
FLOATS = np.array([[0.0, 0.25, 1.0], [0.5, 0.125, 0.75]], dtype=np.float32)


def x_0_of(folder: Path, **options: Any) -> np.ndarray:
    data = load_data(str(folder), **options)
    return data.x_0(torch.arange(len(data))).numpy()


def expected(values: np.ndarray, low: float, high: float) -> np.ndarray:
    return 2 * (values.astype(np.float64) - low) / (high - low) - 1


def tiff(values: np.ndarray, order: str, bits: int, sample_format: int) -> bytes:
    """An uncompressed grey TIFF, written from the specification; sample_format: 1 unsigned, 2 signed, 3 float."""
    height, width = values.shape
    data = values.astype(values.dtype.newbyteorder(order)).tobytes()
    entries = [(256, 4, width), (257, 4, height), (258, 3, bits), (259, 3, 1), (262, 3, 1), (273, 4, 8)]
    entries += [(277, 3, 1), (278, 4, height), (279, 4, len(data)), (339, 3, sample_format)]
    table = struct.pack(order + "H", len(entries))
    for tag, kind, value in entries:
        table += struct.pack(order + "HHI", tag, kind, 1)
        table += struct.pack(order + "I", value) if kind == 4 else struct.pack(order + "HH", value, 0)
    mark = b"MM" if order == ">" else b"II"
    return mark + struct.pack(order + "HI", 42, 8 + len(data)) + data + table + bytes(4)


def png(values: np.ndarray) -> bytes:
    """A 16-bit PNG of [H, W] or [H, W, 3], written from the specification."""
    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, 0 if values.ndim == 2 else 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.png", png(GREY16)),
        ("a.tif", tiff(GREY16, "<", 16, 1)),
        ("a.tiff", tiff(GREY16, ">", 16, 1)),
    ],
    ids=["png", "little-endian-tiff", "big-endian-tiff"],
)
def test_images_of_16_bits_keep_them(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    np.testing.assert_allclose(x_0_of(tmp_path)[0, 0], expected(GREY16, 0, 65_535), rtol=0, atol=1e-7)


@pytest.mark.parametrize("order", ["<", ">"])
def test_floats_and_signed_integers_ask_for_their_range_and_keep_their_values(tmp_path: Path, order: str) -> None:
    for values, bits, sample_format, value_range in (
        (FLOATS, 32, 3, (0.0, 1.0)),
        (GREY16.astype(np.int32) - 5, 32, 2, (-5.0, 65_530.0)),
    ):
        (tmp_path / "a.tif").write_bytes(tiff(values, order, bits, sample_format))
        with pytest.raises(ValueError, match=r"values from .* do not say .*--value-range"):
            load_data(str(tmp_path))
        x_0 = x_0_of(tmp_path, value_range=value_range)
        np.testing.assert_allclose(x_0[0, 0], expected(values, *value_range), rtol=0, atol=1e-7)
        with pytest.raises(ValueError, match="do not lie in value_range"):
            load_data(str(tmp_path), value_range=(0.25, 0.5))


def test_a_tiff_of_fractional_sizes_is_refused_by_name(tmp_path: Path) -> None:
    content = bytearray(tiff(GREY16, "<", 16, 1))
    # The type of StripOffsets, the sixth entry, becomes RATIONAL.
    entry = 8 + GREY16.nbytes + 2 + 5 * 12
    assert struct.unpack_from("<HH", content, entry) == (273, 4)
    struct.pack_into("<H", content, entry + 2, 5)
    (tmp_path / "a.tif").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.tif: not a usable image"):
        load_data(str(tmp_path))


def test_12_bits_in_16_are_asked_about(tmp_path: Path) -> None:
    values = GREY16 // 16
    (tmp_path / "a.png").write_bytes(png(values))
    with pytest.raises(ValueError, match="uint16 values from 0 to 4095 do not say"):
        load_data(str(tmp_path))
    for high in (4095.0, 65_535.0):
        np.testing.assert_allclose(
            x_0_of(tmp_path, value_range=(0.0, high))[0, 0], expected(values, 0, high), rtol=0, atol=1e-7
        )


def test_images_of_8_and_16_bits_are_scaled_each_by_its_own(tmp_path: Path) -> None:
    grey8 = np.array([[0, 3, 255], [17, 128, 64]], dtype=np.uint8)
    Image.fromarray(grey8).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(png(GREY16))
    x_0 = x_0_of(tmp_path)
    np.testing.assert_allclose(x_0[0, 0], expected(grey8, 0, 255), rtol=0, atol=1e-7)
    np.testing.assert_allclose(x_0[1, 0], expected(GREY16, 0, 65_535), rtol=0, atol=1e-7)


def test_resizing_keeps_16_bits_and_stays_in_range(tmp_path: Path) -> None:
    edge = np.zeros((16, 16), dtype=np.uint16)
    edge[:, 8:] = 65_535
    edge[3, 3] = 40_000
    (tmp_path / "a.png").write_bytes(png(edge))
    x_0 = x_0_of(tmp_path, resolution=8)
    assert x_0.min() == -1.0
    assert x_0.max() == 1.0
    assert len(np.unique(np.round((x_0 + 1) * 127.5, 3) % 1)) > 2  # values between those of 8 bits


def test_colours_of_16_bits_are_taken_as_the_message_says(tmp_path: Path) -> None:
    colours = np.arange(48, dtype=np.uint16).reshape(4, 4, 3) * 1000 + 14_535
    (tmp_path / "a.png").write_bytes(png(colours))
    with pytest.raises(ValueError, match=r"a\.png: .*of uint16 \[N, H, W, 3\] in a \.npy file"):
        load_data(str(tmp_path))
    np.save(tmp_path / "a.npy", colours[None])
    x_0 = load_data(str(tmp_path / "a.npy")).images[0].permute(1, 2, 0)
    np.testing.assert_allclose(x_0, expected(colours, 0, 65_535), rtol=0, atol=1e-7)


def test_frames_that_are_lost_are_named(tmp_path: Path) -> None:
    frames = [Image.fromarray(np.full((2, 3), value, np.uint8)) for value in (10, 200)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    with pytest.warns(UserWarning, match="lose every frame but the first"):
        data = load_data(str(tmp_path))
    assert set(data.images.unique().tolist()) == {10}


def test_transparent_pixels_ask_for_a_background(tmp_path: Path) -> None:
    rgba = np.zeros((2, 2, 4), np.uint8)
    rgba[0, 0] = (200, 100, 0, 255)
    rgba[0, 1] = (0, 0, 0, 51)
    Image.fromarray(rgba).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.png: .*transparent pixels.*--background white"):
        load_data(str(tmp_path))
    images = load_data(str(tmp_path), background="white").images[0].permute(1, 2, 0)
    assert images.tolist() == [[[200, 100, 0], [204, 204, 204]], [[255, 255, 255], [255, 255, 255]]]
    rgba[..., 3] = 255
    Image.fromarray(rgba).save(tmp_path / "a.png")
    assert load_data(str(tmp_path)).images[0, :, 0, 1].tolist() == [0, 0, 0]


@pytest.mark.parametrize("mode", ["P", "CMYK", "1", "LA"])
def test_other_modes_become_the_colours_that_they_mean(tmp_path: Path, mode: str) -> None:
    rgb = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 255]]], np.uint8)
    if mode in ("1", "LA"):
        rgb = np.broadcast_to(np.array([[[0], [255]], [[255], [0]]], np.uint8), (2, 2, 3)).copy()
    if mode == "CMYK":
        Image.merge("CMYK", [Image.fromarray(255 - rgb[..., i]) for i in range(3)] + [Image.new("L", (2, 2))]).save(
            tmp_path / "a.tif"
        )
    else:
        image = Image.fromarray(rgb)
        image = image.quantize(4) if mode == "P" else image.convert("L").convert(mode)
        image.save(tmp_path / "a.png")
    images = load_data(str(tmp_path)).images[0].permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(np.broadcast_to(images, rgb.shape), rgb)


def test_a_stray_image_beside_class_folders_is_named(tmp_path: Path) -> None:
    for name in ("cat/0.png", "dog/0.png", "preview.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / name)
    with pytest.warns(UserWarning, match=r"1 images, 'preview\.png' first, lie beside the 2 in subfolders"):
        assert load_data(str(tmp_path)).labels is None
    (tmp_path / "preview.png").unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_data(str(tmp_path)).classes == ("cat", "dog")


def test_arrays_in_0_to_1_ask_for_their_range(tmp_path: Path) -> None:
    np.save(tmp_path / "d.npy", np.stack([FLOATS, FLOATS]))
    with pytest.raises(ValueError, match="float32 values from 0 to 1 do not say"):
        load_data(str(tmp_path / "d.npy"))
    for value_range in ((0.0, 1.0), (-1.0, 1.0)):
        x_0 = x_0_of(tmp_path / "d.npy", value_range=value_range)
        np.testing.assert_allclose(x_0[1, 0], expected(FLOATS, *value_range), rtol=0, atol=1e-7)


@pytest.mark.parametrize("channels", [2, 4, 5])
def test_arrays_may_have_any_number_of_channels(tmp_path: Path, channels: int) -> None:
    nchw = np.random.default_rng(0).integers(0, 256, (3, channels, 8, 8), dtype=np.uint8)
    for array in (nchw, nchw.transpose(0, 2, 3, 1)):
        np.save(tmp_path / "d.npy", array)
        assert torch.equal(load_data(str(tmp_path / "d.npy")).images, torch.from_numpy(nchw))


def test_an_array_whose_channels_cannot_be_told_asks(tmp_path: Path) -> None:
    array = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 8), dtype=np.uint8)
    np.save(tmp_path / "d.npy", array)
    with pytest.raises(ValueError, match=r"holds the channels.*--channels first"):
        load_data(str(tmp_path / "d.npy"))
    first = load_data(str(tmp_path / "d.npy"), channels="first").images
    last = load_data(str(tmp_path / "d.npy"), channels="last").images
    assert torch.equal(first, torch.from_numpy(array))
    assert torch.equal(last, torch.from_numpy(array.transpose(0, 3, 1, 2).copy()))


def test_train_and_eval_take_the_options_that_messages_name(tmp_path: Path) -> None:
    config = TrainConfig(data="d", out="o", value_range="-1,1", background="white", channels="last")
    assert config.data_options()["value_range"] == (-1.0, 1.0)
    (tmp_path / "a.tif").write_bytes(tiff(FLOATS, "<", 32, 3))
    reference = load_reference(str(tmp_path), (1, 2, 3), value_range=(0.0, 1.0)).train
    np.testing.assert_allclose(reference.x_0(torch.arange(1))[0, 0], expected(FLOATS, 0, 1), rtol=0, atol=1e-7)
    with pytest.raises(ValueError, match="two numbers LO,HI"):
        TrainConfig(data="d", out="o", value_range="0..1")
