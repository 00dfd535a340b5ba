"""An opened ONNX file: its hash, contract and model are read once and passed on, in place of a path."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from fcos_deploy.core.contract import ModelContract, read_contract
from fcos_deploy.core.errors import BackendLoadError
from fcos_deploy.core.files import sha256_file
from fcos_deploy.core.libraries import lazy_import

__all__ = ["OnnxGraph"]

onnx = lazy_import("onnx", extra="export")


class OnnxGraph:
    """One ONNX file. Every property is computed when it is first asked for, and only then.

    Raises:
        BackendLoadError: there is no such file.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise BackendLoadError(f"'{path}' is not there.")
        self.path = path

    @cached_property
    def sha256(self) -> str:
        """Hash of the file, in hexadecimal."""
        return sha256_file(self.path)

    @cached_property
    def contract(self) -> ModelContract:
        """The contract that the file carries.

        Raises:
            BackendLoadError: it carries none, or is damaged.
        """
        return read_contract(self.path)

    @cached_property
    def model(self) -> Any:  # an onnx.ModelProto; the onnx package has no types
        """The checked model. Everyone shares it, so nobody changes it.

        Raises:
            BackendLoadError: the file is not a complete ONNX model.
            MissingDependencyError: onnx is not installed.
        """
        load, check = onnx.load, onnx.checker.check_model  # outside of the try: onnx may be missing
        try:
            model = load(str(self.path))
            check(model)
        except Exception as error:  # protobuf's and the checker's own exceptions have no common base
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
            raise BackendLoadError(
                f"'{self.path}' is not a complete ONNX model: {reason}.", hint="export it again"
            ) from error
        return model
