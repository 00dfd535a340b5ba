"""What a deployment starts from: a checkpoint, a wrapped module in memory, or an ONNX file with a contract."""

from __future__ import annotations

import importlib
import re
import sys
import tempfile
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fcos_deploy.checkpoints.load import describe_checkpoint
from fcos_deploy.core.artifact import OnnxGraph, files_of, is_checkpoint, read_contract
from fcos_deploy.core.backend import SessionOptions
from fcos_deploy.core.checkpoint_options import CheckpointOptions
from fcos_deploy.core.contract import Decision, ModelContract
from fcos_deploy.core.enums import DeformForm, NmsForm, PerformanceHint, Precision, Tail
from fcos_deploy.core.errors import ConfigError
from fcos_deploy.core.files import sha256_file
from fcos_deploy.core.libraries import library_versions
from fcos_deploy.core.onnx_file import onnx_interface, save_onnx, with_contract
from fcos_deploy.core.progress import ProgressFn
from fcos_deploy.detector import Detector, DetectorSpec
from fcos_deploy.targets.profiles import operators_of

if TYPE_CHECKING:
    from fcos_deploy.checkpoints.load import LoadedCheckpoint
    from fcos_deploy.model.wrap import WrappedModule

__all__ = [
    "DeploySource",
    "GraphForm",
    "WrittenGraph",
    "names_a_function",
    "open_source",
    "run_user_code",
    "source_contract",
    "source_operators",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphForm:
    """Which float graph of a source is asked for; the names are those of ``ExportOptions``."""

    tail: Tail
    precision: Precision
    nms_form: NmsForm
    deform_form: DeformForm
    opset: int | None
    batch: int | None


@dataclass(frozen=True, slots=True)
class WrittenGraph:
    """What the manifest keeps of a graph: figures and checks by name, and the versions of the libraries."""

    config: dict[str, str]
    tools: dict[str, str]


class DeploySource(ABC):
    """``sha256`` identifies it; ``size`` is in bytes. ``note`` is what has to be said of it beside every verdict."""

    name: str
    sha256: str
    size: int
    contract: ModelContract
    has_deformable: bool = False
    note: str = ""
    decisions: tuple[Decision, ...] = ()

    @abstractmethod
    def reference(self) -> DetectorSpec:
        """The detector that every artifact is measured against."""

    @abstractmethod
    def write_graph(self, output: Path, form: GraphForm, *, progress: ProgressFn) -> WrittenGraph:
        """Write the float graph.

        Raises:
            ConfigError: the source has no such graph.
        """

    def close(self) -> None:  # noqa: B027  (most sources hold nothing)
        """Release what only the deployment needed."""


class _Network(DeploySource):
    """A PyTorch network with its contract. ``file`` holds its weights, and its size stands for the network's."""

    def __init__(
        self, loaded: LoadedCheckpoint | WrappedModule, *, name: str, file: Path, options: CheckpointOptions
    ) -> None:
        from fcos_deploy.model.fcos import DeformConv2d

        self.name, self.contract, self.sha256 = name, loaded.contract, loaded.contract.source_sha256
        self.size = sum(part.stat().st_size for part in files_of(file))
        self.has_deformable = any(isinstance(module, DeformConv2d) for module in loaded.model.modules())
        self._loaded, self._file, self._options = loaded, file, options

    def reference(self) -> DetectorSpec:
        """PyTorch eager in float32, post-processing on the host."""
        return _NetworkSpec(
            model=self._file,
            backend="pytorch",
            precision=Precision.FP32,
            options=SessionOptions(checkpoint=self._options),
            network=self._loaded.model,
            contract=replace(self.contract, tail=Tail.RAW),
        )

    def write_graph(self, output: Path, form: GraphForm, *, progress: ProgressFn) -> WrittenGraph:
        """Export, and compare with PyTorch."""
        from exporters.torch_onnx import ExportOptions, export_onnx

        options = ExportOptions(
            tail=form.tail,
            opset=form.opset,
            precision=form.precision,
            nms_form=form.nms_form,
            deform_form=form.deform_form,
            batch=form.batch,
        )
        exported = export_onnx(self._loaded, output, options=options, progress=progress)
        checks = {check.step: str(check) for check in exported.checks}
        config = {"opset": str(exported.opset), "nodes": str(exported.nodes), **checks}
        return WrittenGraph(config, library_versions("torch", "onnx", "onnxscript", "onnxsim"))


@dataclass(frozen=True, slots=True, kw_only=True)
class _NetworkSpec(DetectorSpec):
    """The network as it was loaded, with the options that the user gave."""

    network: Any  # torch.nn.Module
    contract: ModelContract

    @property
    def opens_file(self) -> bool:
        """A module of one's own lives in this process only."""
        return is_checkpoint(self.model)

    def open(self, hint: PerformanceHint | None = None) -> Detector:
        """The PyTorch network behind the same preprocessing as every artifact."""
        options = self.options if hint is None else replace(self.options, hint=hint)
        return Detector.of_network(self.network, self.contract, options=options)


class _Graph(DeploySource):
    """An ONNX file with a contract: its fp32 graph is the reference, and no PyTorch is needed."""

    def __init__(self, path: Path) -> None:
        self.contract, interface = read_contract(path), onnx_interface(path)
        if self.contract.precision is not Precision.FP32 or interface.is_quantized:
            raise ConfigError(
                f"'{path}' is {self.contract.precision}; a deployment begins with the fp32 graph.",
                hint="deploy the fp32 ONNX file; fp16 and INT8 are made from it with --precision",
            )
        batch = interface.inputs[0].shape[0]
        if batch not in (1, None):
            raise ConfigError(f"'{path}' takes batches of {batch}, the graphs of a bundle take one image.")
        self.name, self.sha256, self._path = path.name, sha256_file(path), path
        self.size = sum(file.stat().st_size for file in files_of(path))
        self.note = (
            f"the reference is the fp32 graph '{path.name}' on ONNX Runtime; "
            "the network that it was exported from was not there to compare with"
        )
        self.decisions = (Decision("reference", "onnxruntime fp32", f"rule: {self.note}"),)

    def reference(self) -> DetectorSpec:
        """The file itself on ONNX Runtime."""
        return DetectorSpec(model=self._path, backend="onnxruntime", precision=Precision.FP32)

    def write_graph(self, output: Path, form: GraphForm, *, progress: ProgressFn) -> WrittenGraph:
        """Write the same graph, or convert it to fp16."""
        if form.tail is not self.contract.tail:
            raise ConfigError(
                f"'{self.name}' ends in the tail '{self.contract.tail}', and '{form.tail}' was asked for.",
                hint=f"--tail {self.contract.tail}; other tails are exported from the checkpoint or the wrapped module",
            )
        interface = onnx_interface(self._path)
        if form.batch is None and interface.inputs[0].shape[0] is not None:
            raise ConfigError(
                f"'{self.name}' takes one image at a time, and batches were asked for.",
                hint="give the checkpoint, or a graph of: fcos-deploy export --batch dynamic",
            )
        config = {"opset": str(interface.opset)}
        if form.precision is Precision.FP16:
            from exporters.rewrite import convert_to_fp16

            check = convert_to_fp16(self._path, output, progress=progress).check
            return WrittenGraph({**config, check.step: str(check)}, library_versions("onnx"))
        # The copy says what it was made from, so that it has a hash of its own and the chain of hashes no loop.
        graph = OnnxGraph(self._path)
        save_onnx(with_contract(graph.model, self.contract, record={"source": self.sha256}), output)
        return WrittenGraph({**config, "copied from": self.name}, library_versions("onnx"))


class _Module(_Network):
    """A module has no file: what identifies it is its exported graph, which changes with its code and its weights."""

    def __init__(self, wrapped: WrappedModule) -> None:
        from exporters.torch_onnx import export_onnx

        self._folder = tempfile.TemporaryDirectory()
        graph = export_onnx(wrapped, Path(self._folder.name) / "module.onnx").path
        identified = replace(wrapped, contract=replace(wrapped.contract, source_sha256=sha256_file(graph)))
        name = type(getattr(wrapped.model, "module", wrapped.model)).__name__
        super().__init__(identified, name=name, file=graph, options=CheckpointOptions())

    def close(self) -> None:
        """Remove the exported graph."""
        self._folder.cleanup()


def open_source(source: Path | WrappedModule, *, options: CheckpointOptions) -> DeploySource:
    """Open what a deployment starts from.

    Raises:
        ConfigError: checkpoint options were given for what is no checkpoint, or an ONNX file is not float.
        BackendLoadError: an ONNX file is damaged, or carries no contract.
        CheckpointError: as ``load_checkpoint``.
    """
    if not isinstance(source, Path):
        _refuse_options(options)
        return _Module(source)
    if _is_graph(source):
        _refuse_options(options)
        return _Graph(source)
    from fcos_deploy.checkpoints.load import load_checkpoint

    loaded = load_checkpoint(source, options=options)
    return _Network(loaded, name=source.name, file=source, options=options)


def source_contract(source: Path | WrappedModule, *, options: CheckpointOptions) -> ModelContract:
    """The contract of what ``open_source`` opens, without its weights. Raises as that does."""
    if isinstance(source, Path) and not _is_graph(source):
        return describe_checkpoint(source, options=options).contract
    _refuse_options(options)
    return _Graph(source).contract if isinstance(source, Path) else source.contract


def source_operators(source: Path | WrappedModule, *, options: CheckpointOptions) -> frozenset[str]:
    """ONNX operators of what ``open_source`` opens, as far as they are known without exporting it. Raises as that does.

    Of a wrapped module only GroupNorm and the deformable convolutions of this package are known.
    """
    if isinstance(source, Path):
        if _is_graph(source):
            return onnx_interface(source).operators
        return operators_of(describe_checkpoint(source, options=options).config)
    from torch.nn import GroupNorm

    from fcos_deploy.model.fcos import DeformConv2d

    kinds = {"GridSample": DeformConv2d, "GroupNormalization": GroupNorm}
    modules = list(source.model.modules())
    return frozenset(name for name, kind in kinds.items() if any(isinstance(module, kind) for module in modules))


def _is_graph(path: Path) -> bool:
    """A checkpoint is known by its content, whatever its name."""
    return path.suffix.lower() == ".onnx" and not is_checkpoint(path)


def _refuse_options(options: CheckpointOptions) -> None:
    if options != CheckpointOptions():
        raise ConfigError(
            "Checkpoint options apply to checkpoints; this model carries its own contract.",
            hint="leave them out",
        )


_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def names_a_function(text: str) -> bool:
    """Whether it is ``package.module:function``, and no file of that name."""
    return _FUNCTION.fullmatch(text) is not None and not Path(text).exists()


def run_user_code(text: str, *, allowed: bool) -> WrappedModule | None:
    """What ``package.module:function`` returns; None where ``text`` is no such name, or names a file.

    The module is looked for in the current folder first, as ``python -m`` does.

    Raises:
        ConfigError: code may not be run, there is no such function, or it returns no wrapped module.
    """
    if not names_a_function(text):
        return None
    if not allowed:
        raise ConfigError(f"'{text}' names a function, and running it runs code of yours.", hint="--run-code allows it")
    from fcos_deploy.model.wrap import WrappedModule

    module, _, function = text.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        wrapped = getattr(importlib.import_module(module), function)()
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"'{text}' cannot be called: {error}.", hint="run it in the folder of the package") from error
    finally:
        sys.path.remove(str(Path.cwd()))
    if not isinstance(wrapped, WrappedModule):
        raise ConfigError(
            f"'{text}' returned a {type(wrapped).__name__}, expected what wrap_module returns.",
            hint="see docs/your-own-fcos.md",
        )
    return wrapped
