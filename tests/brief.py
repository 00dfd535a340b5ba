"""Speed is measured briefly and without new processes, where a test looks at no time. As a program: ``fcos-deploy``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fcos_deploy.benchmark import run
from fcos_deploy.benchmark.measure import ColdStart, TimingOptions


def measure_briefly(replace: Callable[[object, str, Any], None]) -> None:
    """``replace`` sets an attribute: ``setattr``, or a patch that is undone."""
    in_turns, brief = run.time_in_turns, TimingOptions(rounds=3, block=2, warmup=1)
    cold_start = ColdStart(imported=0.1, opened=0.2, first_detection=0.3, peak_memory_mib=100.0)
    replace(run, "measure_cold_start", lambda *_: cold_start)
    replace(run, "measure_throughput", lambda *_, **__: 10.0)
    replace(run, "time_in_turns", lambda *models, **given: in_turns(*models, **{**given, "options": brief}))


if __name__ == "__main__":
    from fcos_deploy.cli.app import main

    measure_briefly(setattr)
    main()
