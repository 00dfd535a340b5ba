"""What is to be said of the images that a model is calibrated and judged on; manifests keep it, reports show it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from fcos_deploy.core.enums import StrEnum

__all__ = ["Finding", "Severity", "undecided_because"]


class Severity(StrEnum):
    """``warning``: to be known. ``inconclusive``: no verdict on these images can be passed. ``refused``: no run."""

    WARNING = "warning"
    INCONCLUSIVE = "inconclusive"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """``kind``: its name for machines, such as ``overlap``. ``message``: half a sentence for people."""

    kind: str
    severity: Severity
    message: str

    @property
    def line(self) -> str:
        """For people."""
        return f"{self.severity}: {self.message}"


def undecided_because(findings: Iterable[Finding]) -> str:
    """Why no verdict can be passed, as half a sentence; empty when nothing stands in the way."""
    return "; ".join(finding.message for finding in findings if finding.severity is Severity.INCONCLUSIVE)
