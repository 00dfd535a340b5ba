"""What model, image and video files are by their content; and what the files of a bundle are called."""

from __future__ import annotations

import re
import stat
from pathlib import Path

from fcos_deploy.core.enums import ArtifactKind, DeformForm, Precision, StrEnum, Tail
from fcos_deploy.core.errors import ConfigError
from fcos_deploy.core.files import open_regular

__all__ = [
    "HEAD_BYTES",
    "IMAGE_SUFFIXES",
    "KINDS_BY_SUFFIX",
    "VIDEO_SUFFIXES",
    "CheckpointFormat",
    "checkpoint_format",
    "describe_content",
    "engine_file",
    "file_head",
    "files_of",
    "graph_file",
    "image_format",
    "is_checkpoint",
    "is_video",
    "kinds_of",
]

_ENGINES = (ArtifactKind.TENSORRT_ENGINE, ArtifactKind.TENSORRT_RTX_ENGINE)

# Engines of TensorRT and TensorRT-RTX look alike, to their names and to us; the backend says which is meant.
KINDS_BY_SUFFIX: dict[str, tuple[ArtifactKind, ...]] = {
    ".pth": (ArtifactKind.CHECKPOINT,),
    ".pt": (ArtifactKind.CHECKPOINT,),
    ".pkl": (ArtifactKind.CHECKPOINT,),
    ".safetensors": (ArtifactKind.CHECKPOINT,),
    ".onnx": (ArtifactKind.ONNX,),
    ".xml": (ArtifactKind.OPENVINO_IR,),
    ".engine": _ENGINES,
    ".plan": _ENGINES,
    ".trt": _ENGINES,
    ".kserve": (ArtifactKind.REMOTE_MODEL,),
}


class CheckpointFormat(StrEnum):
    """How a checkpoint is written; ``torch-legacy`` is what ``torch.save`` wrote before torch 1.6."""

    TORCH = "torch"
    TORCH_LEGACY = "torch-legacy"
    SAFETENSORS = "safetensors"
    PICKLE = "pickle"


_HEAD = 64  # bytes; enough to tell every format
_LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."


def checkpoint_format(head: bytes, *, size: int) -> CheckpointFormat | None:
    """The format that a file of ``size`` bytes beginning with ``head`` is in; None when it is no checkpoint."""
    if head[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
        return CheckpointFormat.TORCH
    if head.startswith(_LEGACY_MAGIC):
        return CheckpointFormat.TORCH_LEGACY
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < size:
        return CheckpointFormat.SAFETENSORS
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return CheckpointFormat.PICKLE
    return None


def kinds_of(path: Path) -> tuple[ArtifactKind, ...]:
    """The kinds that a model file can be: a checkpoint by its content, whatever its name; others by their suffix.

    Raises:
        ConfigError: it is no file, or neither its content nor its suffix is known.
    """
    if is_checkpoint(path):
        return (ArtifactKind.CHECKPOINT,)
    kinds = KINDS_BY_SUFFIX.get(path.suffix.lower())
    if kinds is None:
        raise ConfigError(
            f"'{path}' is not a model: its content is not a checkpoint's, and the suffix '{path.suffix}' is unknown.",
            hint=f"give a checkpoint, a bundle, or a file that ends in {', '.join(KINDS_BY_SUFFIX)}",
        )
    return kinds


def is_checkpoint(path: Path) -> bool:
    """Whether the content is a checkpoint's; a folder is none, whatever its name.

    Raises:
        ConfigError: there is nothing, or it cannot be read.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a folder; or a pipe, which would block
            return False
        with path.open("rb") as stream:
            return checkpoint_format(stream.read(_HEAD), size=path.stat().st_size) is not None
    except OSError as error:
        raise ConfigError(f"Cannot read '{path}': {error.strerror or error}.") from error


def files_of(model: Path) -> list[Path]:
    """A model's file, then those that belong beside it and are there: an IR's weights and contract, external data."""
    if is_checkpoint(model):
        return [model]
    beside = (model.with_suffix(".bin"), model.with_suffix(".json"), model.with_name(model.name + ".data"))
    return [model, *(path for path in beside if path.is_file())]


def graph_file(
    precision: Precision, *, tail: Tail, placement: str = "", deform_form: DeformForm = DeformForm.GRID_SAMPLE
) -> str:
    """A graph in a bundle: ``model.fp32.onnx``, ``model.int8.portable.onnx``, ``model.fp16.candidates.onnx``.

    With DeformConv, which not every runtime has, ``model.fp32.deform-conv.onnx``; a placement says it already.
    """
    operator = "deform-conv" if deform_form is DeformForm.OPERATOR and not placement else ""
    parts = (str(precision), placement, operator, "" if tail is Tail.RAW else str(tail))
    return ".".join(["model", *filter(None, parts), "onnx"])


def engine_file(precision: Precision, *, backend: str, kind: ArtifactKind) -> str:
    """What a backend's builder makes: ``model.int8.openvino.xml``, ``model.fp16.tensorrt.engine``."""
    suffix = next(suffix for suffix, kinds in KINDS_BY_SUFFIX.items() if kind in kinds)
    return f"model.{precision}.{backend}{suffix}"


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
