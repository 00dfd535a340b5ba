"""TensorRT-RTX engines: built ahead of time for named compute capabilities, on a machine without a GPU."""

from __future__ import annotations

from exporters._tensorrt_build import BuilderLibrary, build_best
from fcos_deploy.core.enums import ArtifactKind
from fcos_deploy.core.exporter import BuildRequest, BuildResult, Exporter

__all__ = ["EXPORTER", "TensorrtRtxExporter"]


class TensorrtRtxExporter(Exporter):
    """ONNX to a TensorRT-RTX engine."""

    name = "tensorrt-rtx"
    source = ArtifactKind.ONNX
    produces = ArtifactKind.TENSORRT_RTX_ENGINE
    extra = "tensorrt-rtx"

    def build(self, request: BuildRequest) -> BuildResult:
        """Build for ``options.compute_capabilities``; none given: the library's portable set."""
        return build_best(
            request, builder=BuilderLibrary(import_name="tensorrt_rtx", extra=self.extra, kind=self.produces)
        )


EXPORTER = TensorrtRtxExporter()
