"""Every error a user can meet, with the exit code of the command line; and how it shows values that others chose."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

__all__ = [
    "AccuracyGateError",
    "BackendError",
    "BackendLoadError",
    "BudgetError",
    "BuildError",
    "BundleError",
    "BundleReplacedError",
    "CalibrationError",
    "CheckpointError",
    "ChecksumError",
    "ConfigError",
    "DeviceError",
    "ExportError",
    "FcosDeployError",
    "ImageError",
    "InconclusiveError",
    "InputSizeError",
    "ManifestVersionError",
    "MissingDependencyError",
    "SignatureError",
    "SlowdownError",
    "StepCheckError",
    "TensorMismatchError",
    "brief",
    "missing_device",
    "printable",
    "some_names",
    "unknown_name",
]


_BRIEF = 80  # characters, and bits of an integer


def brief(value: object) -> str:
    """A value of a file as an error shows it, in a line; lists and objects by their type alone.

    Text for a nested or shared list, or for an integer of a million digits, would take minutes and gigabytes.
    """
    if isinstance(value, str):
        return repr(value if len(value) <= _BRIEF else value[:_BRIEF] + "...")
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > _BRIEF:
        return f"an integer of {value.bit_length()} bits"
    if value is None or isinstance(value, (bool, int, float)):
        return repr(value)
    return f"a {type(value).__name__}"


def printable(text: str, *, lines: bool = False) -> str:
    """``text`` with its control characters as escapes: they move the cursor, colour, or turn the order of letters.

    ``lines``: the ends of lines, which a name cannot have, stay.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or (lines and c == "\n") else ascii(c)[1:-1] for c in text)


class FcosDeployError(Exception):
    """Something the user can act on: a sentence that says what is wrong, and a hint that says what to do."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  hint: {self.hint}" if self.hint else self.message


class ConfigError(FcosDeployError):
    """An option, or a combination of options, that makes no sense."""

    exit_code = 2


def some_names(names: Iterable[str], *, count: int = 5) -> str:
    """The first names in quotes, and how many more there are."""
    quoted = [f"'{name}'" for name in names]
    return ", ".join(quoted[:count]) + (f" and {len(quoted) - count} more" if len(quoted) > count else "")


def some_lines(problems: Sequence[str], *, count: int) -> list[str]:
    """The first problems, a line each, and how many more there are."""
    more = [f"... and {len(problems) - count} more."] if len(problems) > count else []
    return [*problems[:count], *more]


def unknown_name(kind: str, name: str, known: Iterable[str]) -> ConfigError:
    """The error for a ``name`` that is none of the ``known`` ones of its ``kind``: suggests the nearest, lists all."""
    names = list(known)
    similar = difflib.get_close_matches(name[:80], names, n=1)  # the time is that of the product
    suggestion = f"did you mean '{similar[0]}'? " if similar else ""
    return ConfigError(f"There is no {kind} {brief(name)}.", hint=f"{suggestion}known: {', '.join(names)}")


class InputSizeError(ConfigError):
    """A fixed input size that the network's strides do not divide."""


class MissingDependencyError(FcosDeployError):
    """A library that this step needs is not installed."""

    exit_code = 3


class AccuracyGateError(FcosDeployError):
    """An accuracy goal was missed."""

    exit_code = 4


class InconclusiveError(AccuracyGateError):
    """An accuracy goal that the data cannot decide: neither kept nor missed."""


class SlowdownError(FcosDeployError):
    """A benchmark that is slower than its baseline allows; a gate, like accuracy's."""

    exit_code = 4


class BudgetError(FcosDeployError):
    """A search that found no configuration within its limits; a gate, like accuracy's."""

    exit_code = 4


class ImageError(FcosDeployError):
    """A file that cannot be read as an image."""


class CheckpointError(FcosDeployError):
    """A checkpoint that is unreadable, unsafe or of an unknown layout."""


class ExportError(FcosDeployError):
    """A model that cannot be turned into the requested artifact."""


class StepCheckError(ExportError):
    """A step whose result no longer equals its source."""


class CalibrationError(FcosDeployError):
    """Calibration data or statistics that cannot be used."""


class BuildError(FcosDeployError):
    """An engine builder that failed; the message ends with the last lines of its own log."""


class BackendError(FcosDeployError):
    """A runtime that failed."""


class BackendLoadError(BackendError):
    """An artifact that the runtime cannot open."""


class DeviceError(BackendError):
    """A device that is not there or does not fit the artifact."""


def missing_device(runtime: str, device: str, devices: Iterable[str]) -> DeviceError:
    """The error of a ``runtime`` for a ``device`` that is none of ``devices``."""
    return DeviceError(f"{runtime} has no device '{device}' here.", hint=f"devices: {', '.join(devices)}")


class TensorMismatchError(BackendError):
    """A tensor whose name, dtype or shape is not what the session expects."""


class BundleError(FcosDeployError):
    """A bundle that is incomplete or inconsistent."""


class ManifestVersionError(BundleError):
    """A manifest written by a newer version."""


class ChecksumError(BundleError):
    """A file whose contents are not what the manifest recorded."""


class BundleReplacedError(BundleError):
    """A bundle in whose place another one was put while it was opened."""


class SignatureError(BundleError):
    """A signature that is missing or does not match."""
