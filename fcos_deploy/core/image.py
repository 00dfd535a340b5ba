"""Reads images from files, to the same pixels on every machine."""

from __future__ import annotations

import io
import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fcos_deploy.core.errors import ImageError
from fcos_deploy.core.libraries import require

__all__ = ["IMAGE_SUFFIXES", "MAX_IMAGE_PIXELS", "list_images", "read_image"]

IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})

# Pillow's own bound against decompression bombs: 537 MB of RGB, more than any camera gives.
MAX_IMAGE_PIXELS = 178_956_970

# `warnings.catch_warnings` is not safe among threads before Python 3.14.
_HEADER_LOCK = threading.Lock()


def list_images(folder: Path) -> list[Path]:
    """All image files in a folder and its subfolders, sorted; hidden files are left out.

    Raises:
        ImageError: when the folder is missing or holds no image.
    """
    if not folder.is_dir():
        raise ImageError(f"'{folder}' is not a folder.", hint="give a folder that holds images")
    images = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file()
    )
    if not images:
        raise ImageError(
            f"'{folder}' holds no images.", hint=f"expected files ending in {', '.join(sorted(IMAGE_SUFFIXES))}"
        )
    return images


def read_image(path: Path) -> NDArray[np.uint8]:
    """An image as (h, w, 3) uint8 RGB, upright as its EXIF orientation says.

    Grayscale is repeated, 16 bits are cut to the upper 8, transparency is dropped, palettes are looked up.

    Raises:
        ImageError: the file is missing, empty, damaged, not an image, or larger than ``MAX_IMAGE_PIXELS``.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ImageError(f"Cannot read image '{path}': {error.strerror or error}.") from error
    if not content:
        raise ImageError(f"Image '{path}' is empty.")
    header = _open_header(path, content)
    if header.format == "JPEG" and header.mode in ("L", "RGB"):
        return _decode_jpeg(path, content)
    return _decode_pillow(path, header)


def _open_header(path: Path, content: bytes) -> Any:  # Any: PIL.Image.Image, imported only when called
    pillow = require("PIL.Image")
    with _HEADER_LOCK, warnings.catch_warnings():
        # Pillow warns from half its bound on, and about unreadable metadata; here only the bound itself is an error.
        warnings.simplefilter("ignore")
        try:
            header = pillow.open(io.BytesIO(content))
        except pillow.DecompressionBombError as error:
            raise _too_large(path, str(error)) from error
        except (pillow.UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
            raise ImageError(f"'{path}' is not an image, or one of an unknown format.") from error
    width, height = header.size
    if width * height > MAX_IMAGE_PIXELS:
        raise _too_large(path, f"it has {width}x{height} pixels")
    return header


def _too_large(path: Path, detail: str) -> ImageError:
    return ImageError(f"Image '{path}' is larger than {MAX_IMAGE_PIXELS} pixels: {detail}.", hint="scale it down first")


def _decode_jpeg(path: Path, content: bytes) -> NDArray[np.uint8]:
    # OpenCV decodes JPEG to the same pixels as Pillow, in less than half the time.
    cv2 = require("cv2")
    if not _jpeg_is_complete(content):  # OpenCV 4 fills what is missing with gray.
        raise ImageError(f"Image '{path}' is damaged: the file ends early.")
    image: NDArray[np.uint8] | None = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
    if image is None:
        raise ImageError(f"Image '{path}' is damaged.")
    cv2.cvtColor(image, cv2.COLOR_BGR2RGB, dst=image)
    return image


def _jpeg_is_complete(content: bytes) -> bool:
    """Whether an end marker follows the start of the first scan (embedded previews lie in segments before it)."""
    position = 2
    while position + 4 <= len(content):
        marker = content[position + 1]
        if marker == 0xFF:  # a fill byte
            position += 1
        elif marker == 0xDA:
            return content.find(b"\xff\xd9", position) >= 0
        else:
            position += 2 + int.from_bytes(content[position + 2 : position + 4], "big")
    return False


def _decode_pillow(path: Path, image: Any) -> NDArray[np.uint8]:
    try:
        image = require("PIL.ImageOps").exif_transpose(image)
        if image.mode.startswith("I") or image.mode == "F":
            # 16-bit values, in whatever type Pillow chose for them: (h, w) -> (h, w, 3) of the upper 8 bits.
            upper = (np.clip(np.asarray(image), 0, 65535).astype(np.uint16) >> 8).astype(np.uint8)
            return np.repeat(upper[:, :, None], 3, axis=2)
        if image.mode != "RGB":
            # By way of RGBA: Pillow cannot drop a palette's transparency directly.
            image = image.convert("RGBA").convert("RGB") if image.mode == "P" else image.convert("RGB")
        return np.array(image, np.uint8)
    except (OSError, SyntaxError, ValueError, EOFError, IndexError) as error:
        raise ImageError(f"Image '{path}' is damaged: {error}.") from error
