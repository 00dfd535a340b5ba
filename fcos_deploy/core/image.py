"""Image files: recognised by their content, listed, and read to the same pixels on every machine."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import logging
import os
import re
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from fcos_deploy.core.enums import Orientation
from fcos_deploy.core.errors import ConfigError, ImageError, brief
from fcos_deploy.core.files import open_regular, read_file
from fcos_deploy.core.jpeg import decode_jpeg, with_messages
from fcos_deploy.core.libraries import require

__all__ = [
    "IMAGE_SUFFIXES",
    "MAX_PIXELS_VARIABLE",
    "VIDEO_SUFFIXES",
    "decode_image",
    "describe_content",
    "file_head",
    "image_content",
    "image_format",
    "image_pixels",
    "image_size",
    "is_video",
    "list_images",
    "pixels_sha256",
    "read_image",
    "windows",
]


_HEAD_BYTES = 512  # enough for every signature below

# The suffixes by which a folder's files are chosen; a file that is named may have any.
IMAGE_SUFFIXES = frozenset(
    (
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".bmp", ".dib", ".gif", ".webp", ".tif", ".tiff"),
        *(".pnm", ".ppm", ".pgm", ".pbm", ".avif", ".jp2", ".j2k", ".jpx", ".jpf", ".j2c", ".jpc"),
    )
)
VIDEO_SUFFIXES = frozenset(
    (
        *(".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".ts", ".mts", ".m2ts", ".flv", ".wmv"),
        *(".asf", ".3gp", ".3g2", ".ogv", ".vob", ".mxf", ".ivf", ".y4m"),
    )
)

# By Pillow's names, the only decoders that are tried: others start programs (EPS is Ghostscript's) or are hardly used.
_IMAGES: tuple[tuple[bytes, str], ...] = (
    (rb"\xff\xd8\xff", "JPEG"),
    (rb"\x89PNG\r\n\x1a\n", "PNG"),
    (rb"BM", "BMP"),
    (rb"GIF8[79]a", "GIF"),
    (rb"RIFF....WEBP", "WEBP"),
    (rb"II[*+]\0|MM\0[*+]", "TIFF"),
    (rb"P[1-6Ff]\s", "PPM"),
    (rb"....ftyp(?:avif|avis|(?:mif1|msf1)....(?:....){0,6}?avi[fs])", "AVIF"),
    (rb"\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51", "JPEG2000"),
)
_VIDEOS = re.compile(
    rb"RIFF....AVI |\x1a\x45\xdf\xa3|....(?:moov|mdat|wide|free|skip)|\0\0\x01[\xba\xb3]|FLV\x01|OggS|DKIF|YUV4MPEG2 "
    rb"|\x30\x26\xb2\x75\x8e\x66\xcf\x11|\x06\x0e\x2b\x34\x02\x05\x01\x01"
    rb"|\x47.{187}\x47|....\x47.{191}\x47"  # MPEG transport streams, plain and with the time stamps of cameras
    rb"|....ftyp(?!hei|hev|mif1|msf1|avif|avis|crx |jp2 |jpx )",
    re.DOTALL,
)
_OTHERS: tuple[tuple[bytes, str], ...] = (
    (rb"....ftyp(?:hei|hev|mif1|msf1)", "a HEIC image"),
    (rb"\xff\x0a|\0\0\0\x0cJXL ", "a JPEG XL image"),
    (rb"....ftypcrx |FUJIFILMCCD-RAW|IIRO|IIRS|IIU\0", "a camera's raw image"),
    (rb"DDS ", "a DDS texture"),
    (rb"icns", "an ICNS icon"),
    (rb"\0\0[\1\2]\0", "an ICO icon"),
    (rb"8BPS", "a Photoshop file"),
    (rb"qoif", "a QOI image"),
    (rb"\x76\x2f\x31\x01", "an OpenEXR image"),
    (rb"SIMPLE  =", "a FITS image"),
    (rb".{128}DICM", "a DICOM image"),
    (rb"%PDF", "a PDF document"),
    (rb"%!PS|\xc5\xd0\xd3\xc6", "PostScript"),
    (rb"\s*(?:<\?xml[^>]*>\s*)?(?:<!--.*?-->\s*)?<svg", "an SVG drawing"),
    (rb"\s*<(?:!doctype )?html", "a web page"),
    (rb"\s*<", "XML"),
    (rb"#EXTM3U", "a playlist"),
    (rb"version https://git-lfs", "a Git LFS pointer, not the file itself (run 'git lfs pull')"),
    (rb"\x1f\x8b|PK\x03\x04", "an archive"),
    (rb"\s*[\[{]", "JSON"),
)
_IMAGE_PATTERNS = tuple((re.compile(pattern, re.DOTALL), name) for pattern, name in _IMAGES)
_OTHER_PATTERNS = tuple((re.compile(pattern, re.DOTALL | re.IGNORECASE), name) for pattern, name in _OTHERS)


def file_head(path: Path) -> bytes:
    """The first bytes of a file; none where it is missing or no plain file."""
    try:
        with open_regular(path) as stream:
            return stream.read(_HEAD_BYTES)
    except (OSError, ValueError):  # ValueError: a name with a NUL character
        return b""


def image_format(head: bytes) -> str:
    """Pillow's name for the format of an image that is read here; '' for anything else."""
    return next((name for pattern, name in _IMAGE_PATTERNS if pattern.match(head)), "")


def is_video(head: bytes) -> bool:
    """Whether it is a container or stream that OpenCV's FFmpeg knows; playlists, which name other files, are not."""
    return not image_format(head) and _VIDEOS.match(head) is not None


def describe_content(head: bytes) -> str:
    """What a file is that is no image that is read here, such as ``a HEIC image``; '' if that is unknown."""
    if is_video(head):
        return "a video"
    return next((name for pattern, name in _OTHER_PATTERNS if pattern.match(head)), "")


_LOG = logging.getLogger(__name__)

MAX_PIXELS_VARIABLE = "FCOS_DEPLOY_MAX_PIXELS"  # the largest image that is decoded, width times height
# A file of 20 KB can have as many pixels as its header says: 192 MB of RGB here, and more than most cameras give.
_MAX_PIXELS = 64_000_000
_PILLOWS_MAX_PIXELS = 178_956_970
_MAX_BYTES = 1 << 30  # of a file
_WINDOW = 16
_WINDOW_BYTES = 256 << 20

_Key = TypeVar("_Key")

# `warnings.catch_warnings` is not safe among threads before Python 3.14.
_HEADER_LOCK = threading.Lock()


def windows(images: Iterable[tuple[_Key, NDArray[np.uint8]]]) -> Iterator[list[tuple[_Key, NDArray[np.uint8]]]]:
    """Images with their keys in groups that fit the memory: up to 16, and to 256 MiB of pixels or one larger image."""
    group: list[tuple[_Key, NDArray[np.uint8]]] = []
    for key, image in images:
        if group and (len(group) == _WINDOW or sum(i.nbytes for _, i in group) + image.nbytes > _WINDOW_BYTES):
            yield group
            group = []
        group.append((key, image))
    if group:
        yield group


def list_images(folder: Path) -> list[Path]:
    """All image files in a folder and its subfolders, sorted; hidden files and folders are left out.

    A file without a suffix is an image if its content is one. What else there is is counted in a warning.

    Raises:
        ImageError: when the folder is missing, cannot be read, or holds no image.
    """
    if not folder.is_dir():
        raise ImageError(f"'{folder}' is not a folder.", hint="give a folder that holds images")
    images: list[Path] = []
    passed: Counter[str] = Counter()

    def refuse(error: OSError) -> None:
        raise ImageError(f"Cannot read the folder '{error.filename}': {error.strerror}.") from error

    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        passed["linked folders"] += sum(Path(parent, name).is_symlink() for name in folders)
        for name in names:
            path = Path(parent, name)
            suffix = path.suffix.lower()
            if name.startswith(".") or not path.is_file():
                continue
            if suffix in IMAGE_SUFFIXES or (not suffix and image_format(file_head(path))):
                images.append(path)
            else:
                passed[suffix or "without a suffix"] += 1
    kinds = ", ".join(f"{count} {suffix}" for suffix, count in sorted(passed.items()) if count)
    if not images:
        raise ImageError(
            f"'{folder}' holds no images{kinds and f', only {kinds}'}.",
            hint=f"expected files ending in {', '.join(sorted(IMAGE_SUFFIXES))}",
        )
    if kinds:
        _warn_once(f"passed over in '{folder}', which has {len(images)} images: {kinds}")
    return sorted(images)


@functools.lru_cache(maxsize=1024)
def _warn_once(message: str) -> None:
    """One command may look into a folder several times."""
    _LOG.warning("%s", message)


def _max_image_pixels() -> int:
    """The largest number of pixels that an image may have.

    Raises:
        ConfigError: ``FCOS_DEPLOY_MAX_PIXELS`` is not a number that Pillow accepts too.
    """
    text = os.environ.get(MAX_PIXELS_VARIABLE, "")
    if not text:
        return _MAX_PIXELS
    if not re.fullmatch(r"\d{1,9}", text, re.ASCII) or not 0 < int(text) <= _PILLOWS_MAX_PIXELS:
        raise ConfigError(f"{MAX_PIXELS_VARIABLE} must be a number from 1 to {_PILLOWS_MAX_PIXELS}, got '{text}'.")
    return int(text)


def read_image(path: Path, *, orientation: Orientation = Orientation.EXIF) -> NDArray[np.uint8]:
    """An image as (h, w, 3) uint8 RGB, upright as its EXIF orientation says, or as its pixels are stored.

    Grayscale is repeated, 16 bits are cut to the upper 8, transparency is dropped, palettes are looked up.

    Raises:
        ImageError: the file is missing, empty, damaged, not an image, or has too many pixels; its pixels are floats or
            integers of 32 bits, for which nothing says what is white; or it has 16 bits of which the upper two are
            never used.
    """
    return decode_image(image_content(path), path=path, orientation=orientation)


def pixels_sha256(pixels: NDArray[np.uint8]) -> str:
    """Of an image's size and decoded pixels (h, w, 3): a copy under another name or in another format has the same."""
    return hashlib.sha256(f"{pixels.shape}".encode() + pixels.tobytes()).hexdigest()


def image_content(path: Path) -> bytes:
    """The bytes of an image file.

    Raises:
        ImageError: it cannot be read, or is larger than any image.
    """
    try:
        return read_file(path, limit=_MAX_BYTES)
    except (OSError, ValueError) as error:  # ValueError: a name with a NUL character
        hint = "give images, folders of images or videos" if isinstance(error, FileNotFoundError) else ""
        reason = getattr(error, "strerror", None) or error
        raise ImageError(f"Cannot read image '{path}': {reason}.", hint=hint) from error


def decode_image(content: bytes, *, path: Path, orientation: Orientation = Orientation.EXIF) -> NDArray[np.uint8]:
    """As ``read_image``, of what was read from ``path``."""
    if not content:
        raise ImageError(f"Image '{path}' is empty.")
    header = _open_header(path, io.BytesIO(content))
    if header.format in ("JPEG", "MPO"):  # MPO: several of them, of which cameras show the first
        pixels = _decode_jpeg(path, content, orientation=orientation)
        if header.mode in ("L", "RGB"):
            return pixels
    return _pillow_pixels(f"Image '{path}'", header, orientation=orientation)


def image_pixels(image: object, *, orientation: Orientation = Orientation.EXIF) -> NDArray[np.uint8]:
    """An image in memory, or the path or the bytes of a file, as ``read_image`` gives it; an array is taken as it is.

    Raises:
        ImageError: it is neither an array, nor a path, nor the bytes of a file, nor an image of Pillow.
    """
    if isinstance(image, np.ndarray):
        return image
    if isinstance(image, (bytes, bytearray, memoryview)):
        return decode_image(bytes(image), path=Path("in memory"), orientation=orientation)
    if isinstance(image, (str, Path)):
        return read_image(Path(image), orientation=orientation)
    pillow = sys.modules.get("PIL.Image")  # Whoever has an image of it has imported it.
    if pillow is not None and isinstance(image, pillow.Image):
        return _pillow_pixels("The image", image, orientation=orientation)
    if not hasattr(image, "shape") or not hasattr(image, "dtype"):
        raise ImageError(
            f"An image must be uint8[h, w, 3] in RGB order, a path, a file's bytes or an image of Pillow, got "
            f"{brief(image)}.",
            hint="read it with read_image",
        )
    pixels: NDArray[np.uint8] = image  # type: ignore[assignment]  # its dtype and shape are checked by preprocess
    return pixels


_EXIF_ORIENTATION = 0x0112
_EXIF_ON_ITS_SIDE = frozenset({5, 6, 7, 8})  # turned by 90 degrees: width and height swap


def image_size(path: Path, *, orientation: Orientation = Orientation.EXIF) -> tuple[int, int]:
    """(height, width) that ``read_image`` gives, from the file's header alone.

    Raises:
        ImageError: the file cannot be read, or is not an image.
    """
    try:
        with path.open("rb") as stream:
            header = _open_header(path, stream)
            width, height = header.size
            turned = orientation is Orientation.EXIF and header.getexif().get(_EXIF_ORIENTATION) in _EXIF_ON_ITS_SIDE
    except OSError as error:
        raise ImageError(f"Cannot read image '{path}': {error.strerror or error}.") from error
    return (width, height) if turned else (height, width)


def _open_header(path: Path, content: IO[bytes]) -> Any:  # Any: PIL.Image.Image, imported only when called
    pillow, limit = require("PIL.Image"), _max_image_pixels()
    head = content.read(_HEAD_BYTES)
    content.seek(0)
    name = image_format(head)
    if not name:
        kind = describe_content(head)
        raise ImageError(
            f"'{path}' is not an image in a supported format{kind and f': it is {kind}'}.", hint=f"formats: {_FORMATS}"
        )
    if name in _OPTIONAL and not require("PIL.features").check(_OPTIONAL[name]):
        raise ImageError(f"'{path}' is {name}, which this Pillow cannot read.", hint="pip install --upgrade pillow")
    with _HEADER_LOCK, warnings.catch_warnings():
        # Pillow warns from half its own bound on, and about unreadable metadata; here only the bound is an error.
        warnings.simplefilter("ignore")
        try:
            require(f"PIL.{_PLUGINS[name]}ImagePlugin")  # Pillow imports most of them only when all others failed.
            header = pillow.open(content, formats=(name,))
        except pillow.DecompressionBombError as error:
            raise _too_large(path, limit, str(error)) from error
        except Exception as error:  # A damaged header can fail in any way in the decoders; none of them is a bug here.
            raise ImageError(f"'{path}' is not an image in a supported format.", hint=f"formats: {_FORMATS}") from error
    width, height = header.size
    if width * height > limit:
        raise _too_large(path, limit, f"it has {width}x{height}")
    if name == "TIFF" and header.mode not in ("I", "F") and _SIGNED in np.ravel(header.tag_v2.get(_SAMPLE_FORMAT, ())):
        raise ImageError(
            f"Image '{path}' has signed pixels, and nothing in it says which value is white.",
            hint="convert it to 8 bits without a sign, with 255 for white",
        )
    if name == "TIFF" and header.tag_v2.get(_NEW_SUBFILE_TYPE, 0) & 1:
        raise ImageError(
            f"The first image of '{path}' is a preview of {width}x{height} pixels, as in raw files of cameras.",
            hint="convert it to JPEG or PNG with the camera's software",
        )
    return header


_NEW_SUBFILE_TYPE = 254  # of TIFF; bit 0: a reduced version of another image of the file
_PHOTOMETRIC, _WHITE_IS_ZERO = 262, 0
_SAMPLE_FORMAT, _SIGNED = 339, 2
_PLUGINS = {
    **{"JPEG": "Jpeg", "PNG": "Png", "BMP": "Bmp", "GIF": "Gif", "WEBP": "WebP", "TIFF": "Tiff", "PPM": "Ppm"},
    **{"AVIF": "Avif", "JPEG2000": "Jpeg2K"},
}
_OPTIONAL = {"WEBP": "webp", "AVIF": "avif", "JPEG2000": "jpg_2000"}  # formats that a Pillow may be built without
_FORMATS = ", ".join(name.lower() for name in _PLUGINS)


def _too_large(path: Path, limit: int, detail: str) -> ImageError:
    return ImageError(
        f"Image '{path}' has more than {limit} pixels: {detail}.",
        hint=f"scale it down, or set {MAX_PIXELS_VARIABLE} if the file is to be trusted",
    )


def _decode_jpeg(path: Path, content: bytes, *, orientation: Orientation) -> NDArray[np.uint8]:
    # OpenCV decodes JPEG to the same pixels as Pillow, in less than half the time, and lets libjpeg's warnings out.
    cv2 = require("cv2")
    flags = cv2.IMREAD_COLOR
    if orientation is Orientation.STORED:
        flags |= cv2.IMREAD_IGNORE_ORIENTATION

    def decode(jpeg: bytes) -> tuple[NDArray[np.uint8] | None, str]:
        with contextlib.suppress(cv2.error):  # which it raises for some damage, and returns None for the rest
            decoded, messages = with_messages(lambda: cv2.imdecode(np.frombuffer(jpeg, np.uint8), flags))
            return decoded, messages
        return None, ""

    image, damage = decode_jpeg(content, decode)
    if damage:
        raise ImageError(f"Image '{path}' is damaged: {damage}.", hint="get it again, or leave it out")
    cv2.cvtColor(image, cv2.COLOR_BGR2RGB, dst=image)
    return image


def _pillow_pixels(what: str, image: Any, *, orientation: Orientation) -> NDArray[np.uint8]:
    try:
        deep = ";16" in str([tile[3] for tile in getattr(image, "tile", ())]) or image.mode.startswith("I")
        if image.mode == "F" or (image.mode == "I" and image.format in ("TIFF", None)):
            pixels = "floating-point pixels" if image.mode == "F" else "integer pixels of 32 bits"
            raise ImageError(
                f"{what} has {pixels}, and nothing in it says which value is white.",
                hint="convert it to 8 or 16 bits, with 255 or 65535 for white",
            )
        inverted = image.format == "TIFF" and image.tag_v2.get(_PHOTOMETRIC) == _WHITE_IS_ZERO
        if orientation is Orientation.EXIF:
            image = require("PIL.ImageOps").exif_transpose(image)
        if image.mode.startswith("I"):
            # 16-bit values, in whatever type Pillow chose for them: (h, w) -> (h, w, 3) of the upper 8 bits.
            values = np.clip(np.asarray(image), 0, 65535)
            _check_range(what, int(values.max(initial=0)))
            if inverted:
                values = 65535 - values  # which Pillow does for 8 bits
            upper = (values.astype(np.uint16) >> 8).astype(np.uint8)
            return np.repeat(upper[:, :, None], 3, axis=2)
        if deep:  # Pillow keeps the upper 8 bits of 16-bit colour.
            _check_range(what, int(np.asarray(image.convert("RGB")).max(initial=0)) << 8)
        if image.mode != "RGB":
            # By way of RGBA: Pillow cannot drop a palette's transparency directly.
            image = image.convert("RGBA").convert("RGB") if image.mode == "P" else image.convert("RGB")
        return np.array(image, np.uint8)
    except ImageError:
        raise
    except Exception as error:  # as for the header
        raise ImageError(f"{what} is damaged: {str(error) or type(error).__name__}.") from error


# The largest value of 14 bits, the most that cameras write into 16 without scaling it.
_MAX_OF_14_BITS = (1 << 14) - 1


def _check_range(what: str, largest: int) -> None:
    """Refuse 16-bit values that never use the upper two bits: data of 10 to 14 bits, which would be nearly black."""
    if 0 < largest <= _MAX_OF_14_BITS:
        raise ImageError(
            f"{what} has 16 bits a value, and its largest value is {largest}: data of fewer bits would be read "
            "as nearly black.",
            hint="scale it to 65535 for white, or convert it to 8 bits",
        )
