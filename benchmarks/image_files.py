"""Reads every image below folders as the product does, and compares the pixels with Pillow's.

    python benchmarks/image_files.py .venv/lib/python3.11/site-packages [FOLDER ...]
    python benchmarks/image_files.py FOLDER --damage 450

Each file is equal to Pillow's pixels, differs (at most 2 levels in JPEG, whose decoders are free to), is refused by one
or by both, or ends in an error that is not the product's: a finding, with exit code 1. ``--damage`` changes 1 to 50
bytes in the scans of JPEG files among them, and counts which of them are refused, where libjpeg's lines come from
glibc's stream and where they come from the file descriptor.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from fcos_deploy.core import jpeg
from fcos_deploy.core.errors import ImageError
from fcos_deploy.core.image import file_head, image_format, read_image

SUFFIXES = frozenset(
    (
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".bmp", ".dib", ".gif", ".webp", ".tif", ".tiff"),
        *(".pnm", ".ppm", ".pgm", ".pbm", ".pfm", ".avif", ".jp2", ".j2k", ".jpx", ".ico", ".icns", ".cur", ".dds"),
        *(".tga", ".pcx", ".psd", ".qoi", ".sgi", ".rgb", ".heic", ".heif", ".jxl", ".im", ".msp", ".xbm", ".xpm"),
    )
)


def pillows_pixels(path: Path) -> NDArray[np.uint8]:
    """(h, w, 3) uint8 RGB of the first image, upright; 16 bits cut to the upper 8, transparency dropped."""
    with Image.open(path) as image:
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I;16"):
            return np.repeat((np.asarray(upright).astype(np.uint16) >> 8).astype(np.uint8)[..., None], 3, axis=2)
        if upright.mode == "I" and image.format in ("PNG", "PPM"):
            return np.repeat((np.asarray(upright) >> 8).astype(np.uint8)[..., None], 3, axis=2)
        if upright.mode in ("I", "F"):
            raise ValueError("32 bits a value, of which nothing says what is white")
        return np.asarray(upright.convert("RGBA").convert("RGB") if upright.mode == "P" else upright.convert("RGB"))


def compare(path: Path) -> tuple[str, str]:
    """The outcome, and what is to be said of it."""
    try:
        expected: NDArray[np.uint8] | None = pillows_pixels(path)
    except Exception as error:  # noqa: BLE001  # whatever Pillow says of a damaged file
        expected, reason = None, f"{type(error).__name__}: {error}"[:80]
    try:
        pixels = read_image(path)
    except ImageError as error:
        if expected is None:
            return "refused by both", ""
        return "refused here alone", error.message.replace(str(path), path.name)
    if expected is None:
        return "read here alone", reason
    if pixels.shape != expected.shape:
        return "another size", f"{pixels.shape[:2]} and {expected.shape[:2]}"
    difference = int(np.abs(pixels.astype(int) - expected).max(initial=0))
    if difference == 0:
        return "equal", ""
    return ("within 2 levels" if difference <= 2 else "different"), f"largest difference {difference}"


def walk(folders: list[Path]) -> list[Path]:
    """Files with an image's suffix, and those without one that are an image."""
    files = [path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()]
    return [p for p in files if p.suffix.lower() in SUFFIXES or (not p.suffix and image_format(file_head(p)))]


def damage(files: list[Path], *, count: int) -> Counter[str]:
    """Of JPEG files with bytes changed in their scans: how many are noticed with each way to libjpeg's lines."""
    rng, outcomes = np.random.default_rng(0), Counter[str]()
    sources = [path.read_bytes() for path in files if image_format(file_head(path)) == "JPEG"]
    sources = [content for content in sources if content.count(b"\xff\xda") and len(content) > 2000]
    ways = {"glibc's stream": jpeg.with_messages, "the file descriptor": jpeg._Descriptor().call}
    for number in range(count):
        content = bytearray(sources[number % len(sources)])
        first = content.rindex(b"\xff\xda") + 14
        changed = min(int(rng.choice([1, 3, 50])), len(content) - first - 2)
        place = int(rng.integers(first, len(content) - changed - 1))
        content[place : place + changed] = rng.integers(0, 256, changed, np.uint8).tobytes()
        for name, capture in ways.items():
            outcomes[f"refused, with {name}"] += bool(jpeg.decode_jpeg(bytes(content), partial(_decode, capture))[1])
    return outcomes


def _decode(capture: Callable[[Callable[[], Any]], tuple[Any, str]], content: bytes) -> tuple[Any, str]:
    try:
        return capture(lambda: cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR))
    except cv2.error:
        return None, ""


def main() -> int:
    """Print the outcomes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--damage", type=int, default=0, help="number of damaged JPEG files to try")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    files = walk(options.folders)
    if options.damage:
        for outcome, number in damage(files, count=options.damage).items():
            print(f"{outcome}: {number} of {options.damage}")
        return 0
    outcomes: dict[str, list[tuple[Path, str]]] = defaultdict(list)
    begin = time.perf_counter()
    for path in files:
        try:
            outcome, remark = compare(path)
        except Exception as error:  # noqa: BLE001  # a finding
            outcome, remark = "ERROR", repr(error)
        outcomes[outcome].append((path, remark))
    print(f"{len(files)} files in {time.perf_counter() - begin:.0f} s")
    for outcome, entries in sorted(outcomes.items()):
        print(f"{outcome}: {len(entries)}")
        kinds = Counter(path.suffix.lower() for path, _ in entries)
        print("   ", ", ".join(f"{number} {suffix}" for suffix, number in kinds.most_common()))
        if outcome not in ("equal", "refused by both", "within 2 levels"):
            for path, remark in entries[:60]:
                print(f"    {path.name}: {remark}")
    return 1 if outcomes.keys() & {"ERROR", "another size"} else 0


if __name__ == "__main__":
    raise SystemExit(main())
