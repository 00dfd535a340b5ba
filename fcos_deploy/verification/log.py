"""Where records of verifications are kept."""

from __future__ import annotations

from pathlib import Path

from fcos_deploy.bundle.log import append_log
from fcos_deploy.bundle.store import Bundle
from fcos_deploy.core.errors import ConfigError
from fcos_deploy.core.serialize import to_json
from fcos_deploy.verification.records import VerificationRecord

__all__ = ["write_record"]


def write_record(record: VerificationRecord, *, bundle: Bundle, log: Path | None = None) -> Path | None:
    """Append ``record`` to ``log``, or to the bundle's own; None when that cannot be written (archive, read-only).

    Raises:
        ConfigError: ``log`` cannot be written.
    """
    if log is not None:
        try:
            append_log(log, to_json(record))
        except OSError as error:
            raise ConfigError(
                f"Cannot write '{log}': {error.strerror or error}.",
                hint="choose a folder that exists and can be written",
            ) from error
        return log
    if bundle.log_path is None:
        return None
    try:
        append_log(bundle.log_path, to_json(record))
    except OSError:
        return None
    return bundle.log_path
