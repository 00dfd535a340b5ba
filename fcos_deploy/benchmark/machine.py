"""Clock, throttling and power of this machine, with a reason where it does not tell them."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from pathlib import Path

from fcos_deploy.core.machine import kernel_text

__all__ = ["ClockReading", "Contention", "ContentionMeter", "PowerMeter", "PowerReading", "read_clock"]

_ROOT = Path("/")


@dataclass(frozen=True, slots=True, kw_only=True)
class ClockReading:
    """Mean clock of the cores in MHz, and how often they were throttled since the start of the machine."""

    mhz: float | None
    throttled: int | None
    problem: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class PowerReading:
    """Mean watts over a measurement, from ``source``; None with the reason in ``problem``."""

    watts: float | None
    source: str = ""
    problem: str = ""


def read_clock(root: Path = _ROOT) -> ClockReading:
    """The clock at this moment."""
    cpus = root / "sys/devices/system/cpu"
    kilohertz = [_number(path) for path in sorted(cpus.glob("cpu[0-9]*/cpufreq/scaling_cur_freq"))]
    known = [value / 1000 for value in kilohertz if value is not None]
    if not known:  # A virtual machine without cpufreq.
        lines = kernel_text(root / "proc/cpuinfo").splitlines()
        known = [float(line.partition(":")[2]) for line in lines if line.startswith("cpu MHz")]
    counts = [_number(path) for path in sorted(cpus.glob("cpu[0-9]*/thermal_throttle/core_throttle_count"))]
    throttled = [int(count) for count in counts if count is not None]
    missing = [] if known else ["no clock in sysfs or cpuinfo"]
    missing += [] if throttled else ["no throttle counters in sysfs (virtual machine or not an Intel processor)"]
    return ClockReading(
        mhz=sum(known) / len(known) if known else None,
        throttled=sum(throttled) if throttled else None,
        problem="; ".join(missing),
    )


# Shares of the processors' time that others may take before a comparison of runtimes is doubtful: one that waits for
# all of its threads stands still when a single one is displaced. Of the other threads that run or wait to, half a one
# on average is a program that computes half of the time.
_MAX_OTHERS, _MAX_STOLEN, _MAX_QUEUED = 0.10, 0.03, 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Contention:
    """Shares (0..1) of the processors' time that ``others`` used, and that the hypervisor gave away (``stolen``).

    ``queued``: threads of other programs that ran or waited to run, on average over the moments that were sampled.
    None: the system does not tell.
    """

    others: float | None = None
    stolen: float | None = None
    queued: float | None = None

    @property
    def problem(self) -> str:
        """Who disturbed the measurement; empty when nobody is known to have."""
        parts = []
        if self.others is not None and self.others > _MAX_OTHERS:
            parts.append(f"other programs used {self.others:.0%} of the processors")
        if self.stolen is not None and self.stolen > _MAX_STOLEN:
            parts.append(f"the hypervisor took {self.stolen:.0%} of their time")
        if self.queued is not None and self.queued > _MAX_QUEUED:
            parts.append(f"{self.queued:.1f} threads of other programs ran or waited to")
        return " and ".join(parts)


@dataclass(slots=True)
class ContentionMeter:
    """What others took of the processors between ``start`` and ``stop``, from Linux' counters in ``/proc/stat``.

    ``sample`` looks at the run queue, which tells who waits; call it now and then, between what is timed.
    """

    root: Path = _ROOT
    _ticks: tuple[int, ...] = field(default=(), init=False)
    _own: float = field(default=0.0, init=False)
    _queued: list[int] = field(default_factory=list, init=False)

    def start(self) -> None:
        """Begin the measurement."""
        self._ticks, self._own, self._queued = self._read(), time.process_time(), []
        self.sample()

    def sample(self) -> None:
        """Count the threads that run or wait to, and are not this process's."""
        lines = (line.split() for line in kernel_text(self.root / "proc/stat").splitlines())
        running = next((int(words[1]) for words in lines if words[:1] == ["procs_running"]), None)
        if running is not None:
            self._queued.append(max(0, running - self._own_running()))

    def _own_running(self) -> int:
        """Runtimes leave threads that spin for a while."""
        # The name, in brackets, may hold anything; the state follows it (proc(5)).
        stats = (kernel_text(path) for path in (self.root / "proc/self/task").glob("*/stat"))
        return sum(stat.rpartition(")")[2].split()[:1] == ["R"] for stat in stats)

    def stop(self) -> Contention:
        """End it; the shares since ``start``."""
        self.sample()
        own = time.process_time() - self._own
        queued = round(sum(self._queued) / len(self._queued), 2) if self._queued else None
        # user, nice, system, idle, iowait, irq, softirq, steal (proc(5)); guests are counted in user already.
        ticks = [after - before for before, after in zip(self._ticks, self._read(), strict=False)]
        if len(ticks) < 8 or sum(ticks) <= 0:
            return Contention(queued=queued)
        total, idle, stolen = sum(ticks), ticks[3] + ticks[4], ticks[7]
        busy = total - idle - stolen
        others = max(0.0, busy - own * os.sysconf("SC_CLK_TCK")) / total
        return Contention(others=round(others, 4), stolen=round(stolen / total, 4), queued=queued)

    def _read(self) -> tuple[int, ...]:
        first = kernel_text(self.root / "proc/stat").partition("\n")[0].split()
        return tuple(int(count) for count in first[1:9]) if first[:1] == ["cpu"] else ()


@dataclass(slots=True)
class PowerMeter:
    """Energy between ``start`` and ``stop``, from RAPL (Intel, AMD) or the INA3221 sensors of a Jetson.

    RAPL counts energy; the Jetson's sensors tell the power of the moment, read at the start and the end.
    """

    root: Path = _ROOT
    _started: float = field(default=0.0, init=False)
    _energy: dict[Path, float] = field(default_factory=dict, init=False)
    _watts: float | None = field(default=None, init=False)

    def start(self) -> None:
        """Begin the measurement."""
        self._started = time.perf_counter()
        self._energy = self._rapl()
        self._watts = self._jetson_watts()

    def stop(self) -> PowerReading:
        """End it; the mean power since ``start``."""
        seconds = time.perf_counter() - self._started
        energy, watts = self._rapl(), self._jetson_watts()
        if self._energy and seconds > 0 and energy.keys() == self._energy.keys():
            joules = 0.0
            for path, microjoules in energy.items():
                rise = microjoules - self._energy[path]
                if rise < 0:  # The counter started again at 0 after its largest value.
                    rise += _number(path.with_name("max_energy_range_uj")) or 0.0
                joules += rise / 1e6
            return PowerReading(watts=joules / seconds, source="RAPL packages")
        if self._watts is not None and watts is not None:
            return PowerReading(watts=(self._watts + watts) / 2, source="INA3221")
        problem = "neither RAPL nor an INA3221 sensor on this machine"
        if self._rapl_counters():
            problem = (
                "RAPL is there but only root may read it (sudo chmod a+r /sys/class/powercap/intel-rapl:*/energy_uj)"
            )
        return PowerReading(watts=None, problem=problem)

    def _rapl_counters(self) -> list[Path]:
        return sorted((self.root / "sys/class/powercap").glob("intel-rapl:[0-9]/energy_uj"))

    def _rapl(self) -> dict[Path, float]:
        """Microjoules of each processor package whose counter can be read."""
        values = {path: _number(path) for path in self._rapl_counters()}
        return {path: value for path, value in values.items() if value is not None}

    def _jetson_watts(self) -> float | None:
        """Sum over the INA3221 rails: millivolts times milliamperes; None without such a sensor."""
        rails = []
        for name in sorted((self.root / "sys/class/hwmon").glob("hwmon*/name")):
            if kernel_text(name) == "ina3221":
                for channel in (1, 2, 3):
                    volts = _number(name.with_name(f"in{channel}_input"))
                    amperes = _number(name.with_name(f"curr{channel}_input"))
                    if volts is not None and amperes is not None:
                        rails.append(volts * amperes / 1e6)
        return sum(rails) if rails else None


def _number(path: Path) -> float | None:
    text = kernel_text(path)
    return float(text) if text.lstrip("-").isdigit() else None
