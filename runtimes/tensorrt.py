"""TensorRT 8.6 to 11, with the full or, for version-compatible engines, the lean runtime."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from fcos_deploy.core.backend import SessionOptions
from fcos_deploy.core.enums import ArtifactKind
from runtimes._tensorrt_library import TensorRT, load_tensorrt
from runtimes._tensorrt_session import ContextFactory, TensorrtFamily

if TYPE_CHECKING:
    import tensorrt as trt

__all__ = ["BACKEND"]


class _Tensorrt(TensorrtFamily):
    name = "tensorrt"
    accepts = frozenset({ArtifactKind.TENSORRT_ENGINE})
    extra = "tensorrt"
    preferred_for = frozenset({ArtifactKind.TENSORRT_ENGINE})

    def _load(self, record: Mapping[str, str]) -> TensorRT:
        # The lean runtime only runs version-compatible engines; probing (no record) takes what there is.
        lean_enough = not record or "version_compatible" in record.get("options", "")
        names = ("tensorrt", "tensorrt_lean", "tensorrt_dispatch") if lean_enough else ("tensorrt",)
        return load_tensorrt(*names, extra=self.extra)

    def _contexts(
        self, library: TensorRT, engine: trt.ICudaEngine, *, path: Path, options: SessionOptions
    ) -> ContextFactory:
        del library, path, options
        return ContextFactory(make=engine.create_execution_context, description={"cuda_graph": "own"})


BACKEND = _Tensorrt()
