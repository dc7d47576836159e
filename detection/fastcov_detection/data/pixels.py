"""Pixels of image files in eight bits, turned as viewers show them; no other file decodes images.

A file's header tells the result of :func:`read_pixels`, so that a data set can be checked without
decoding it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import PIL
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image
from torchvision.io import ImageReadMode, decode_jpeg

from fastcov_detection.errors import DataError

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""Pillow's turn for each value of the EXIF tag Orientation; 1 is upright."""
DECODER = f"Pillow {PIL.__version__}"
MOST_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 89_478_485)
"""Pixels of the largest image that is decoded."""
MOST_OF_16_BITS = 65535
SWAPS = (5, 6, 7, 8)
"""Orientations that exchange width and height."""

# Modes whose conversion to RGB keeps the range of eight bits.
_EIGHT_BITS = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr")
_SIXTEEN_BITS = ("I;16", "I;16B", "I;16L", "I;16N")
# Bytes at the end of a file, in which its closing mark is looked for.
_TAIL = 64


class Header(NamedTuple):
    """Facts in an image file's header, of a file that is whole."""

    width: int
    height: int
    """Stored size, before the turn that ``orientation`` asks for."""
    orientation: int
    """EXIF value of 1 to 8; 1 where the decoder turns the image itself."""
    mode: str
    """Pillow's name of the pixel format."""
    brightest: int | None
    """Largest value of a 16-bit image; None for others."""
    is_transparent: bool
    """True if a pixel is not opaque."""

    def shown_size(self, *, turn: bool = True) -> tuple[int, int]:
        """Width and height of the pixels that :func:`read_pixels` returns."""
        swaps = turn and self.orientation in SWAPS
        return (self.height, self.width) if swaps else (self.width, self.height)


def read_header(path: Path) -> Header:
    """Header of an image, whose file is checked to be whole.

    Files without an end mark are decoded to see whether they are whole, and so are images of
    16 bits, whose range is needed, and those that may be transparent.

    Raises:
        UnreadableError: If the file is no image, is cut short, or has pixels of unknown range.
    """
    with _open(path) as (image, file):
        is_16_bit = _check_mode(image)
        # Pillow turns TIFF images itself when it decodes them.
        if is_16_bit or image.format == "TIFF" or not _has_end(file, image.format):
            image.load()
        brightest = int(np.asarray(image).max()) if is_16_bit else None
        is_transparent = image.has_transparency_data and _is_transparent(image)
        return Header(*image.size, _orientation(image), image.mode, brightest, is_transparent)


def read_pixels(path: Path, *, turn: bool = True) -> NDArray[np.uint8]:
    """The pixels of an image in RGB.

    Args:
        path: File of any format that Pillow decodes; the first frame is read.
        turn: Turn the image as its EXIF orientation asks, as viewers do. False: as it is stored.

    Returns:
        Values of 0 to 255; those of a 16-bit image are divided by 257. [height, width, 3]

    Raises:
        DataError: If the file cannot be decoded or its range is unknown.
    """
    try:
        with _open(path) as (image, file):
            is_16_bit = _check_mode(image)
            transpose = _TURNS.get(_orientation(image)) if turn else None
            if image.format == "JPEG" and image.mode == "RGB" and _has_end(file, "JPEG"):
                pixels = _decode_jpeg(file)
                if transpose is None:
                    return pixels
                return np.array(Image.fromarray(pixels).transpose(transpose))
            image.load()
            # Pillow turns TIFF images itself while it decodes them.
            transpose = _TURNS.get(_orientation(image)) if turn else None
            if is_16_bit:
                wide = np.asarray(image).astype(np.uint32)
                image = Image.fromarray(((wide + 128) // 257).astype(np.uint8))
            image = image.convert("RGB")
            return np.array(image if transpose is None else image.transpose(transpose))
    except UnreadableError as error:
        raise DataError(f"image {path} {error.text}; {error.remedy}") from None


def _decode_jpeg(file: IO[bytes]) -> NDArray[np.uint8]:
    """The pixels of a whole JPEG in RGB, by torchvision: the bits of Pillow in half the time."""
    file.seek(0)
    coded = torch.frombuffer(bytearray(file.read()), dtype=torch.uint8)
    pixels: NDArray[np.uint8] = decode_jpeg(coded, ImageReadMode.RGB).permute(1, 2, 0).numpy()
    return np.ascontiguousarray(pixels)


class UnreadableError(Exception):
    """Failure of a decoder, in words about the image, with the remedy."""

    def __init__(self, text: str, remedy: str) -> None:
        super().__init__(text)
        self.text, self.remedy = text, remedy


@contextmanager
def _open(path: Path) -> Iterator[tuple[Image.Image, IO[bytes]]]:
    """An image whose decoder's errors, of whatever type, become one."""
    try:
        with path.open("rb") as file, Image.open(file) as image:
            yield image, file
    except (UnreadableError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise UnreadableError(f"is too large ({error})", "cut it into tiles") from None
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UnreadableError(
            f"cannot be read ({reason})", "replace it, or take it out of the annotations"
        ) from None


def _orientation(image: Image.Image) -> int:
    # A broken EXIF block is no reason to refuse an image: viewers show it upright.
    try:
        found: Any = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:
        return 1
    return found if found in _TURNS else 1


def _check_mode(image: Image.Image) -> bool:
    """True if the pixels have 16 bits; pixels whose range is unknown are refused."""
    if image.mode in _EIGHT_BITS:
        return False
    # Older versions of Pillow call 16-bit PNG "I", which is 32 bits elsewhere.
    if image.mode in _SIXTEEN_BITS or (image.mode == "I" and image.format == "PNG"):
        return True
    raise UnreadableError(
        f"has pixels of mode {image.mode!r}, whose range is unknown",
        "save it with 8 or 16 bits a channel",
    )


def _is_transparent(image: Image.Image) -> bool:
    alpha = np.asarray(image.convert("RGBA"))[..., 3]
    return bool((alpha < 255).any())


def _has_end(file: IO[bytes], kind: str | None) -> bool:
    """True if the file ends with the closing mark of its format; False where none is known."""
    marks = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}
    if kind not in marks:
        return False
    place = file.tell()
    file.seek(0, os.SEEK_END)
    file.seek(max(0, file.tell() - _TAIL))
    tail = file.read()
    file.seek(place)
    return tail.rstrip(b"\0\r\n ").endswith(marks[kind])
