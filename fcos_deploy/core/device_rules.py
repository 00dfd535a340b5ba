"""The rules that forbid a plan: each returns a sentence when the plan breaks it (sources: docs/hardware.md)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fcos_deploy.core.devices import DeviceProfile
from fcos_deploy.core.enums import ArtifactKind, NmsForm, Precision, Tail
from fcos_deploy.core.exporter import BatchRange
from fcos_deploy.core.registry import exporter_to
from fcos_deploy.core.version import parse_version

__all__ = ["RULES", "Draft", "PlanRequest", "rule_name"]

_MOST_TOP_K = 3840  # of TensorRT's TopK
_WITHOUT_PLUGIN = (11,)  # EfficientNMS_TRT is deprecated from 10.12 on, and not to be relied on after 10


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRequest:
    """What is wanted; None and empty leave the choice to the profile. ``batch`` equal in all three is a fixed one.

    ``input_size`` (height, width) None: sizes follow the image. ``nms_form`` is that of the nms tail, and
    ``image_sizes`` whether its graph has that second input (``ModelContract.needs_image_sizes``; it has for every
    ecosystem whose boxes are clipped or suppressed in image pixels).
    """

    backend: str = ""
    precision: Precision | None = None
    tail: Tail | None = None
    batch: BatchRange | None = None
    input_size: tuple[int, int] | None = (800, 1344)
    nms_form: NmsForm | None = None
    image_sizes: bool = True
    opset: int = 17
    pre_nms_top_k: int = 1000
    dla_core: int | None = None
    calibration_cache: bool = False
    workspace_mib: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """A request with the profile's choices filled in."""

    profile: DeviceProfile
    request: PlanRequest
    backend: str
    precision: Precision
    tail: Tail
    batch: BatchRange

    @property
    def kind(self) -> ArtifactKind:
        """What the backend opens."""
        return exporter_to(self.backend).target

    @property
    def builds_engine(self) -> bool:
        """Whether TensorRT or TensorRT-RTX builds it."""
        return self.kind in (ArtifactKind.TENSORRT_ENGINE, ArtifactKind.TENSORRT_RTX_ENGINE)

    @property
    def dynamic(self) -> bool:
        """Whether the batch or the input size may vary."""
        return self.batch.minimum != self.batch.maximum or self.request.input_size is None

    @property
    def tensorrt(self) -> str:
        """The device's TensorRT; empty on other devices and for TensorRT-RTX, which is installed by pip."""
        nvidia = self.profile.nvidia
        return nvidia.tensorrt if nvidia is not None and self.kind is ArtifactKind.TENSORRT_ENGINE else ""

    @property
    def nms_form(self) -> NmsForm:
        """How the nms tail suppresses: as asked for, or as suits the target."""
        if self.request.nms_form is not None:
            return self.request.nms_form
        if not self._has_nms_operator:
            return NmsForm.STATIC
        # The plug-in's outputs have fixed sizes, the operator's have not. Only float graphs: ONNX Runtime, which
        # collects the ranges for int8, has no such plug-in.
        return NmsForm.PLUGIN if self._has_plugin and self.precision is not Precision.INT8 else NmsForm.ONNX

    @property
    def _has_nms_operator(self) -> bool:
        intel = self.profile.intel
        return self.kind is not ArtifactKind.TENSORRT_RTX_ENGINE and (intel is None or not intel.static_shapes)

    @property
    def _has_plugin(self) -> bool:
        return bool(self.version) and self.version < _WITHOUT_PLUGIN

    @property
    def nms_problem(self) -> str:
        """Why this target has not the form of NMS; empty where it has."""
        if self.nms_form is NmsForm.PLUGIN and not self._has_plugin:
            return "EfficientNMS_TRT is a plug-in of TensorRT up to 10; take another form of the nms tail."
        if self.nms_form is not NmsForm.ONNX or self._has_nms_operator:
            return ""
        if self.kind is ArtifactKind.TENSORRT_RTX_ENGINE:
            return "TensorRT-RTX has no NMS operator; take the tail 'candidates', or the nms tail in its static form."
        return "NMS gives outputs of unknown size, which this device cannot compile; take the tail 'raw' or static NMS."

    @property
    def version(self) -> tuple[int, ...]:
        """``tensorrt`` as numbers."""
        return parse_version(self.tensorrt) if self.tensorrt else ()


def _backend_on_device(draft: Draft) -> str:
    if draft.backend in draft.profile.backends:
        return ""
    return f"backend '{draft.backend}' does not run there, it has {', '.join(draft.profile.backends)}."


def _precision_on_device(draft: Draft) -> str:
    if draft.precision in draft.profile.precisions:
        return ""
    return f"it does not compute in {draft.precision}, only in {', '.join(draft.profile.precisions)}."


def _opset_of_parser(draft: Draft) -> str:
    """GroupNormalization of opset 18 cannot be used with torch's scales, 21's needs TensorRT 10.9; up to 8.6: 17."""
    version, opset = draft.version, draft.request.opset
    if not version or opset <= 17:
        return ""
    if version < (8, 7):
        return f"TensorRT {draft.tensorrt} reads ONNX up to opset 17, not {opset}."
    if opset >= 21 and version < (10, 9):
        return f"GroupNormalization of opset {opset} needs TensorRT 10.9 or later; export with opset 17."
    return ""


def _nms_operator(draft: Draft) -> str:
    return draft.nms_problem if draft.tail is Tail.NMS else ""


def _top_k_limit(draft: Draft) -> str:
    if not draft.builds_engine or draft.tail is Tail.RAW or draft.request.pre_nms_top_k <= _MOST_TOP_K:
        return ""
    return f"TensorRT's TopK takes at most {_MOST_TOP_K}, pre_nms_top_k is {draft.request.pre_nms_top_k}."


def _static_shapes(draft: Draft) -> str:
    intel = draft.profile.intel
    if intel is None or not intel.static_shapes or not draft.dynamic:
        return ""
    return "it compiles graphs with fixed shapes only; give one batch size and an input size."


def _size_range(draft: Draft) -> str:
    if not draft.builds_engine or draft.request.input_size is not None:
        return ""
    return "an engine needs bounds for its input; give an input size, or build with height and width ranges there."


def _dla(draft: Draft) -> str:
    if draft.request.dla_core is None:
        return ""
    cores = draft.profile.nvidia.dla_cores if draft.profile.nvidia is not None and draft.tensorrt else 0
    if draft.request.dla_core not in range(cores):
        return f"DLA core {draft.request.dla_core} was asked for, this device and TensorRT have {cores}."
    if draft.dynamic:
        return "a DLA takes fixed shapes only; give one batch size."
    if draft.precision is Precision.FP32:
        return "a DLA computes in fp16 and int8 only."
    if draft.precision is Precision.INT8 and not draft.request.calibration_cache and draft.version < (11, 4):
        return "before TensorRT 11.4 a DLA takes int8 from a calibration cache only, not from Q/DQ nodes."
    return ""


def _calibrators(draft: Draft) -> str:
    if not draft.request.calibration_cache:
        return ""
    if not draft.tensorrt or draft.version >= (11,):
        return "calibration caches are read by TensorRT up to 10 only; INT8 is in the ONNX file."
    return "" if draft.precision is Precision.INT8 else "a calibration cache is for int8."


def _workspace(draft: Draft) -> str:
    wanted = draft.request.workspace_mib or 0
    if wanted < draft.profile.memory_mib:
        return ""
    return f"a workspace of {wanted} MiB does not fit its {draft.profile.memory_mib} MiB of memory."


RULES: tuple[Callable[[Draft], str], ...] = (
    _backend_on_device,
    _precision_on_device,
    _static_shapes,
    _size_range,
    _nms_operator,
    _top_k_limit,
    _opset_of_parser,
    _dla,
    _calibrators,
    _workspace,
)


def rule_name(rule: Callable[[Draft], str]) -> str:
    """What docs/hardware.md calls it."""
    return rule.__name__.removeprefix("_").replace("_", "-")
