"""Verdicts as JUnit XML, which every CI system shows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from fcos_deploy.accuracy.gate import Verdict
from fcos_deploy.core.atomic import write_text

__all__ = ["junit_xml", "write_junit"]


def junit_xml(verdicts: Sequence[Verdict], *, suite: str) -> str:
    """One test suite with a test case for every verdict, as XML text."""
    failures = sum(not verdict.passed for verdict in verdicts)
    root = ElementTree.Element("testsuites")
    counts = {"tests": str(len(verdicts)), "failures": str(failures), "errors": "0", "skipped": "0"}
    element = ElementTree.SubElement(root, "testsuite", {"name": suite, **counts})
    for verdict in verdicts:
        case = ElementTree.SubElement(element, "testcase", {"classname": verdict.subject, "name": verdict.name})
        if not verdict.passed:
            failure = ElementTree.SubElement(case, "failure", {"message": verdict.message, "type": "AccuracyGateError"})
            failure.text = f"{verdict.name}: {verdict.value:.6g}, limit {verdict.limit:.6g}"
        ElementTree.SubElement(case, "system-out").text = verdict.message
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def write_junit(path: Path, verdicts: Sequence[Verdict], *, suite: str) -> None:
    """Write the XML atomically.

    Raises:
        ConfigError: the file cannot be written.
    """
    write_text(path, junit_xml(verdicts, suite=suite))
