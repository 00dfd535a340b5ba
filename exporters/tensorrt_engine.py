"""TensorRT engines: built on the device that runs them, by TensorRT 8.6 to 11."""

from __future__ import annotations

from exporters._tensorrt_build import BuilderLibrary, build_best
from fcos_deploy.core.enums import ArtifactKind
from fcos_deploy.core.exporter import BuildRequest, BuildResult, Exporter

__all__ = ["EXPORTER", "TensorrtExporter"]


class TensorrtExporter(Exporter):
    """ONNX to a TensorRT engine."""

    name = "tensorrt"
    source = ArtifactKind.ONNX
    produces = ArtifactKind.TENSORRT_ENGINE
    extra = "tensorrt"

    def build(self, request: BuildRequest) -> BuildResult:
        """Build for the GPU of this machine."""
        return build_best(request, builder=BuilderLibrary(import_name="tensorrt", extra=self.extra, kind=self.produces))


EXPORTER = TensorrtExporter()
