"""TensorRT-RTX: compiles the engine for the GPU when it is loaded, and keeps what it compiled in a runtime cache."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from fcos_deploy.core.backend import SessionOptions
from fcos_deploy.core.enums import ArtifactKind
from fcos_deploy.core.files import sha256_file
from fcos_deploy.core.trust import KeptModel
from runtimes._tensorrt_library import TensorRT, load_tensorrt
from runtimes._tensorrt_session import ContextFactory, TensorrtFamily

if TYPE_CHECKING:
    import tensorrt as trt

__all__ = ["BACKEND"]

_LOG = logging.getLogger(__name__)


class _TensorrtRtx(TensorrtFamily):
    name = "tensorrt-rtx"
    accepts = frozenset({ArtifactKind.TENSORRT_RTX_ENGINE})
    extra = "tensorrt-rtx"
    preferred_for = frozenset({ArtifactKind.TENSORRT_RTX_ENGINE})

    def _load(self, record: Mapping[str, str]) -> TensorRT:
        del record
        return load_tensorrt("tensorrt_rtx", extra=self.extra)

    def _contexts(
        self, library: TensorRT, engine: trt.ICudaEngine, *, path: Path, options: SessionOptions
    ) -> ContextFactory:
        rtx = cast(Any, library)  # Any: names of RTX that the stubs of TensorRT lack
        config = engine.create_runtime_config()
        cast(Any, config).cuda_graph_strategy = rtx.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        # The library checks by itself that a cache fits the driver and the GPU.
        facts = {"model": sha256_file(path), "version": library.__version__}
        cache = _RuntimeCache(config, KeptModel(self.name, facts=facts, folder=options.cache_dir))
        return ContextFactory(
            make=lambda: engine.create_execution_context(runtime_config=config),
            description={"cuda_graph": "TensorRT-RTX's", "runtime_cache": cache.state},
            close=cache.save,
            own_graphs=False,
        )


class _RuntimeCache:
    """What TensorRT-RTX compiled for this GPU, between processes."""

    def __init__(self, config: trt.IRuntimeConfig, kept: KeptModel) -> None:
        rtx_config = cast(Any, config)  # Any: members of RTX that the stubs of TensorRT lack
        self._cache = rtx_config.create_runtime_cache()
        self._kept = kept
        self.state = "new" if kept.enabled else "off"
        content = kept.load()
        if content is not None:
            # A cache of another driver or version is refused, and written anew when the session closes.
            self.state = "loaded" if self._cache.deserialize(content) else "refused, will be written anew"
        rtx_config.set_runtime_cache(self._cache)

    def save(self) -> None:
        """A cache that cannot be written costs time at the next start; what this session found is worth more."""
        if not self._kept.enabled:
            return
        try:
            self._kept.store(bytes(memoryview(self._cache.serialize())))
        except TypeError as error:  # TensorRT-RTX gave nothing.
            _LOG.warning("What was compiled for this GPU is not kept: %s", error)


BACKEND = _TensorrtRtx()
