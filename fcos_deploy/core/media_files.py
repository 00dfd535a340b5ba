"""What image and video files are by their first bytes, whatever they are called."""

from __future__ import annotations

import re
from pathlib import Path

from fcos_deploy.core.files import open_regular

__all__ = [
    "HEAD_BYTES",
    "IMAGE_SUFFIXES",
    "VIDEO_SUFFIXES",
    "describe_content",
    "file_head",
    "image_format",
    "is_video",
]

HEAD_BYTES = 512  # enough for every signature below

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
            return stream.read(HEAD_BYTES)
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
