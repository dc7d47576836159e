"""Pixels of every kind of image, at their range."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps

from fastcov_detection.data.pixels import Header, UnreadableError, read_header, read_pixels
from fastcov_detection.errors import DataError

RAMP = np.linspace(0, 255, 24 * 32).reshape(24, 32)


@pytest.mark.parametrize("ending", ["png", "tif"])
@pytest.mark.parametrize("order", ["<u2", ">u2"])
def test_16_bits_are_read_at_their_range(tmp_path: Path, ending: str, order: str) -> None:
    path = tmp_path / f"a.{ending}"
    Image.fromarray((RAMP * 257).astype(order)).save(path)
    pixels = read_pixels(path)
    assert pixels.shape == (24, 32, 3)
    np.testing.assert_allclose(pixels[..., 0], RAMP, atol=0.51)
    assert (pixels[..., 0] == pixels[..., 2]).all()
    header = read_header(path)
    assert isinstance(header, Header)
    assert header.brightest == 65535


def test_16_bits_a_channel_are_read_at_their_range(tmp_path: Path) -> None:
    """Pillow writes no such file: a PNG by hand."""
    rows = np.repeat((RAMP * 257).astype(">u2")[..., None], 3, axis=2)
    raw = b"".join(b"\0" + row.tobytes() for row in rows)

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = zlib.crc32(kind + content).to_bytes(4, "big")
        return len(content).to_bytes(4, "big") + kind + content + check

    header = (32).to_bytes(4, "big") + (24).to_bytes(4, "big") + bytes([16, 2, 0, 0, 0])
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(raw)), chunk(b"IEND", b"")]
    path = tmp_path / "a.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    assert isinstance(read_header(path), Header)
    np.testing.assert_allclose(read_pixels(path)[..., 1], RAMP, atol=1.01)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_8_bits_are_read_as_they_are(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("a.tif" if mode in ("CMYK", "YCbCr") else "a.png")
    Image.fromarray(np.full((24, 32, 3), 255, np.uint8)).convert(mode).save(path)
    assert read_pixels(path).min() >= 254
    header = read_header(path)
    assert isinstance(header, Header)
    assert (header.width, header.height, header.brightest) == (32, 24, None)


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_other_ranges_are_refused(tmp_path: Path, dtype: type) -> None:
    path = tmp_path / "a.tif"
    Image.fromarray(RAMP.astype(dtype)).save(path)
    with pytest.raises(DataError, match=r"image .*a\.tif has pixels of mode '[FI]', whose range"):
        read_pixels(path)
    with pytest.raises(UnreadableError):
        read_header(path)


def test_too_many_pixels_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    Image.new("L", (64, 64)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(
        DataError, match=r"a\.png is too large \(.*4096 pixels.*; cut it into tiles"
    ):
        read_pixels(path)


def test_an_end_that_a_tool_padded_is_an_end(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    Image.new("RGB", (32, 24)).save(path)
    path.write_bytes(path.read_bytes() + b"\0" * 20 + b"\r\n")
    assert isinstance(read_header(path), Header)


@pytest.mark.parametrize("quality", [30, 92])
@pytest.mark.parametrize("subsampling", [0, 2])
@pytest.mark.parametrize("orientation", [1, 6])
def test_jpegs_have_the_bits_of_pillow(
    tmp_path: Path, quality: int, subsampling: int, orientation: int
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (45, 70, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    path = tmp_path / "a.jpg"
    Image.fromarray(pixels).save(path, quality=quality, subsampling=subsampling, exif=exif)
    with Image.open(path) as image:
        expected = np.array(ImageOps.exif_transpose(image))
    np.testing.assert_array_equal(read_pixels(path), expected)
