"""Detections on disk, one line an image, so that an interrupted evaluation goes on where it stopped."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import IO, Any

import numpy as np

from fcos_deploy.core.detections import Detections
from fcos_deploy.core.errors import ConfigError

__all__ = ["PredictionStore"]


class PredictionStore:
    """What was found so far, by image number; kept in memory, and in a file where one was opened."""

    def __init__(self) -> None:
        self.found: dict[int, Detections] = {}
        self._stream: IO[str] | None = None

    @staticmethod
    def open(folder: Path, *, key: str) -> PredictionStore:
        """The store ``KEY.jsonl`` in ``folder``, with what an earlier run left in it.

        A last line that a killed run left incomplete is dropped.

        Raises:
            ConfigError: the folder cannot be written.
        """
        store = PredictionStore()
        path = folder / f"{key[:32]}.jsonl"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            kept = store._load(path)
            store._stream = path.open("a", encoding="utf-8")
            store._stream.truncate(kept)
        except OSError as error:
            raise ConfigError(f"Cannot keep predictions in '{folder}': {error.strerror}.") from error
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"'{path}' is damaged: {error!r}.", hint="delete it, and the images run again") from error
        return store

    def add(self, image_id: int, found: Detections) -> None:
        """Remember an image's detections, on disk before this returns.

        Raises:
            ConfigError: the disk is full or was removed; what was kept before stays.
        """
        self.found[image_id] = found
        if self._stream is None:
            return
        try:
            self._stream.write(_line(image_id, found))
            self._stream.flush()
        except OSError as error:
            stream, self._stream = self._stream, None
            with contextlib.suppress(OSError):
                stream.close()  # which tries to write once more
            raise ConfigError(
                f"Cannot keep predictions in '{stream.name}': {error.strerror}.",
                hint="make room and run the command again: it goes on where it was",
            ) from error

    def __enter__(self) -> PredictionStore:
        return self

    def __exit__(self, *_: object) -> None:
        if self._stream is not None:
            self._stream.close()

    def _load(self, path: Path) -> int:
        """Read the complete lines; returns how many bytes they are."""
        kept = 0
        if path.exists():
            for line in path.read_bytes().splitlines(keepends=True):
                if not line.endswith(b"\n"):
                    break
                record = json.loads(line)
                self.found[int(record["image_id"])] = _detections(record)
                kept += len(line)
        return kept


def _line(image_id: int, found: Detections) -> str:
    record = {
        "image_id": image_id,
        "boxes": found.boxes.tolist(),
        "scores": found.scores.tolist(),
        "labels": found.labels.tolist(),
    }
    return json.dumps(record) + "\n"


def _detections(record: dict[str, Any]) -> Detections:
    return Detections(
        np.array(record["boxes"], np.float32).reshape(-1, 4),
        np.array(record["scores"], np.float32),
        np.array(record["labels"], np.int64),
    )
