"""JUnit XML as CI systems read it."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path

from fcos_deploy.accuracy.gate import Verdict, write_junit


def verdict(passed: bool, message: str) -> Verdict:
    return Verdict(name="max_map_drop", subject="openvino int8", passed=passed, value=0.04, limit=0.01, message=message)


def test_cases_and_failures(tmp_path: Path) -> None:
    path = tmp_path / "junit.xml"
    write_junit(path, [verdict(True, "fine"), verdict(False, 'drop 0.04 > 0.01 & "more" <em>')], suite="evaluate")
    (suite,) = ElementTree.parse(path).getroot()
    assert suite.attrib == {"name": "evaluate", "tests": "2", "failures": "1", "errors": "0", "skipped": "0"}
    good, bad = suite
    assert good.find("failure") is None
    assert bad.attrib == {"classname": "openvino int8", "name": "max_map_drop"}
    failure = bad.find("failure")
    assert failure is not None
    assert failure.attrib["message"] == 'drop 0.04 > 0.01 & "more" <em>'
    assert failure.text == "max_map_drop: 0.04, limit 0.01"
