"""Mutates images and checkpoints and hands them to the real readers, in processes of limited memory and time.

    python benchmarks/hostile_files.py --images 50000 --checkpoints 2000

Every file must be read or refused with an error of ours. Anything else that is raised, and what takes more than its
limits, is a finding: the seed is printed, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import pickle
import resource
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

MEMORY = 3 << 30  # bytes of address space of a process that reads
SECONDS = 20  # of processor time for one file
CHUNK = 500  # files of one process


def image_seeds() -> list[bytes]:
    """One small image of each format and mode that is read."""
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)
    colour = Image.fromarray(pixels)
    files = []
    for form, mode, options in (
        ("JPEG", "RGB", {}),
        ("JPEG", "CMYK", {}),
        ("JPEG", "RGB", {"progressive": True}),
        ("PNG", "RGB", {}),
        ("PNG", "P", {}),
        ("PNG", "RGBA", {}),
        ("GIF", "P", {}),
        ("BMP", "RGB", {}),
        ("PPM", "RGB", {}),
        ("TIFF", "RGB", {}),
        ("TIFF", "RGB", {"compression": "tiff_lzw"}),
        ("TIFF", "L", {"compression": "tiff_deflate"}),
        ("WEBP", "RGB", {}),
        ("WEBP", "RGB", {"lossless": True}),
        ("AVIF", "RGB", {}),
        ("JPEG2000", "RGB", {}),
    ):
        stream = io.BytesIO()
        colour.convert(mode).save(stream, form, **options)
        files.append(stream.getvalue())
    return files


def checkpoint_seeds() -> list[bytes]:
    """A small FCOS in each form of file that is read."""
    import torch
    from safetensors.torch import save

    from fcos_deploy.core.network import resnet_config
    from fcos_deploy.model.fcos import Fcos

    torch.manual_seed(0)
    weights = Fcos(resnet_config(18, num_classes=2, stem_channels=4, fpn_channels=32)).state_dict()
    files = []
    for zipped in (True, False):
        stream = io.BytesIO()
        torch.save({"model": weights, "epoch": 3}, stream, _use_new_zipfile_serialization=zipped)
        files.append(stream.getvalue())
    files.append(pickle.dumps({"model": {name: tensor.numpy() for name, tensor in weights.items()}}))
    files.append(save({name: tensor.contiguous() for name, tensor in weights.items()}, metadata={"format": "pt"}))
    return files


def mutated(content: bytes, rng: np.random.Generator) -> bytes:
    """Bytes flipped, numbers made extreme, pieces cut out or repeated; mostly near the start, where headers are."""
    data = bytearray(content)
    for _ in range(int(rng.integers(1, 9))):
        reach = len(data) if rng.random() < 0.3 else min(len(data), 4096)
        place = int(rng.integers(max(1, reach)))
        kind = int(rng.integers(6))
        if kind == 0:
            data[place : place + 1] = bytes([int(rng.integers(256))])
        elif kind == 1:
            width = int(rng.choice([1, 2, 4, 8]))
            data[place : place + width] = rng.choice([b"\xff", b"\x00", b"\x7f", b"\x80"]) * width
        elif kind == 2:
            del data[place : place + int(rng.integers(1, 64))]
        elif kind == 3:
            data[place:place] = data[place : place + int(rng.integers(1, 64))]
        elif kind == 4:
            data[place:place] = rng.bytes(int(rng.integers(1, 16)))
        elif rng.random() < 0.2:
            del data[place:]
    return bytes(data)


def read_one_image(path: Path) -> None:
    """As every command reads it."""
    from fcos_deploy.core.image import read_image

    read_image(path)


def read_one_checkpoint(path: Path) -> None:
    """As ``inspect`` reads it."""
    from fcos_deploy.core.checkpoint_options import CheckpointOptions
    from fcos_deploy.pipeline.inspect import inspect_file

    inspect_file(path, options=CheckpointOptions(input_size=(64, 64)))


def work(task: tuple[str, list[bytes], int, int]) -> Counter[str]:
    """Read the mutants ``first`` to ``first + count`` in this process, which the limits may kill."""
    from fcos_deploy.core.errors import FcosDeployError

    kind, seeds, first, count = task
    read: Callable[[Path], None] = read_one_image if kind == "images" else read_one_checkpoint
    read_limits()
    outcomes: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        for number in range(first, first + count):
            rng = np.random.default_rng([number, len(seeds)])
            path.unlink(missing_ok=True)
            path.write_bytes(mutated(seeds[number % len(seeds)], rng))
            used = time.process_time()
            try:
                read(path)
                outcomes["read"] += 1
            except FcosDeployError as error:
                outcomes[f"refused ({type(error).__name__})"] += 1
            except BaseException as error:  # noqa: BLE001  (everything else is a finding)
                outcomes[f"FINDING seed {number}: {type(error).__name__} {error}"[:200]] += 1
            if time.process_time() - used > SECONDS:
                outcomes[f"FINDING seed {number}: more than {SECONDS} s"] += 1
    outcomes["peak MiB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return outcomes


def read_limits() -> None:
    """Bound this process."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def run(kind: str, count: int, *, start: int, budget: float) -> dict[str, Any]:
    """All mutants of a kind, as far as ``budget`` seconds reach."""
    seeds = image_seeds() if kind == "images" else checkpoint_seeds()
    tasks = [(kind, seeds, first, min(CHUNK, start + count - first)) for first in range(start, start + count, CHUNK)]
    total: Counter[str] = Counter()
    peak, tried, began = 0, 0, time.monotonic()
    with multiprocessing.get_context("spawn").Pool(os.cpu_count(), maxtasksperchild=4) as pool:
        for outcomes in pool.imap_unordered(work, tasks):
            peak = max(peak, outcomes.pop("peak MiB"))
            total += outcomes
            tried = sum(total.values())
            if time.monotonic() - began > budget:
                pool.terminate()
                break
    return {"tried": tried, "peak_mib": peak, "seconds": round(time.monotonic() - began, 1), **dict(total)}


def main() -> int:
    """Print the outcomes as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--checkpoints", type=int, default=2_000)
    parser.add_argument("--start", type=int, default=0, help="first seed")
    parser.add_argument("--budget", type=float, default=3600.0, help="seconds for each kind")
    options = parser.parse_args()
    results = {
        kind: run(kind, count, start=options.start, budget=options.budget)
        for kind, count in (("images", options.images), ("checkpoints", options.checkpoints))
        if count
    }
    print(json.dumps(results, indent=1))
    return int(any("FINDING" in name for result in results.values() for name in result))


if __name__ == "__main__":
    raise SystemExit(main())
