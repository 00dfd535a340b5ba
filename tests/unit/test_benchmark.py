"""What the benchmark says of times, machines and earlier runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fcos_deploy.benchmark import measure
from fcos_deploy.benchmark.measure import (
    ClockReading,
    Contention,
    ContentionMeter,
    LatencyStats,
    PowerMeter,
    PowerReading,
    Speedup,
    StageMedians,
    read_clock,
)
from fcos_deploy.benchmark.run import (
    Benchmark,
    BenchmarkResult,
    benchmark_json,
    compare_with_baseline,
    demo_image,
    model_bytes,
    read_baseline,
    require_no_slowdown,
    save_benchmark,
    with_equal_threads,
)
from fcos_deploy.core.backend import SessionOptions
from fcos_deploy.core.errors import ConfigError, SlowdownError
from fcos_deploy.core.image import read_image
from fcos_deploy.core.machine import MachineFacts
from fcos_deploy.detector import DetectorSpec


def result(backend: str = "openvino", *, times: float = 10.0) -> BenchmarkResult:
    return BenchmarkResult(
        model="m.onnx",
        backend=backend,
        precision="int8",
        latency=LatencyStats.of(np.array([times, times + 1, times + 2])),
        stages=StageMedians(preprocess=1.0, infer=8.0, decode=1.0),
        throughput_fps=90.0,
        power=PowerReading(watts=None, problem="none"),
        joules_per_image=None,
        cold_start=None,
        file_bytes=7,
        clock=ClockReading(mhz=None, throttled=None, problem="none"),
        session={"backend": backend},
        samples_ms=(times, times + 1, times + 2),
        rounds_ms=(times, times + 1),
    )


def benchmark(*results: BenchmarkResult, processor: str = "P") -> Benchmark:
    machine = MachineFacts(machine="m", processor=processor, cores=2, memory_mib=1, system="s", python="3")
    return Benchmark(machine=machine, image="x.jpg", results=results, throttled=None)


def test_percentiles_of_known_times() -> None:
    stats = LatencyStats.of(np.arange(1.0, 102.0))
    assert (stats.mean, stats.p50, stats.p90, stats.p99) == (51.0, 51.0, 91.0, None)
    assert (stats.minimum, stats.maximum, stats.count) == (1.0, 101.0, 101)
    assert LatencyStats.of(np.arange(1.0, 202.0)).p99 == 199.0
    assert LatencyStats.of(np.arange(1.0, 20.0)).p90 is None
    with pytest.raises(ConfigError, match="no times"):
        LatencyStats.of(np.zeros(0))


@pytest.mark.parametrize(
    ("reference", "candidate", "ratio", "doubt"),
    [
        ((24.0, 25.0, 24.5, 24.2), (10.0, 10.2, 10.1, 10.3), 2.4, ""),
        ((24.0, 600.0, 24.5, 580.0), (10.0, 11.0, 10.1, 10.3), 2.4, "between rounds"),
        ((240.0, 250.0, 245.0, 24.0), (10.0, 10.2, 10.1, 10.3), 2.4, "between rounds"),
    ],
)
def test_a_speedup_is_the_ratio_of_the_fastest_rounds(
    reference: tuple[float, ...], candidate: tuple[float, ...], ratio: float, doubt: str
) -> None:
    speedup = Speedup.of(reference, candidate)
    assert speedup.ratio == pytest.approx(ratio)
    assert doubt in speedup.problem
    assert bool(speedup.problem) is bool(doubt)


def test_other_load_and_unequal_threads_make_a_speedup_doubtful(tmp_path: Path) -> None:
    slow, fast = result(times=20.0), result(times=10.0)
    assert benchmark(slow, fast).speedup(fast, reference=slow).problem == ""
    busy = replace(benchmark(slow, fast), contention=Contention(others=0.4, stolen=0.0))
    assert "other programs used 40% of the processors" in busy.speedup(fast, reference=slow).problem
    threads = [replace(r, session={"threads": count}) for r, count in ((slow, "1"), (fast, "2"))]
    assert "1 threads, this one with 2" in benchmark(*threads).speedup(threads[1], reference=threads[0]).problem


@pytest.mark.parametrize(
    ("asked", "said", "limits"),
    [
        ((None, None, None), ("all cores", "1", ""), (1, 1, None)),
        ((None, None), ("all cores", "all cores"), (None, None)),
        ((None, 3), ("all cores", "3"), (3, 3)),
        ((1, 2, None), ("1", "2", "8"), (1, 2, 1)),
        ((None, None), ("", ""), (None, None)),
    ],
)
def test_contestants_get_equal_threads(
    asked: tuple[int | None, ...], said: tuple[str, ...], limits: tuple[int | None, ...]
) -> None:
    candidates = [DetectorSpec(model=Path("m.onnx"), options=SessionOptions(threads=count)) for count in asked]
    assert tuple(spec.options.threads for spec in with_equal_threads(candidates, said)) == limits


def test_what_others_take_of_the_processors_is_read_from_the_kernel(tmp_path: Path) -> None:
    """Of 1000 ticks 400 are busy, hardly any of them this process's, and 50 are stolen."""
    stat = tmp_path / "proc" / "stat"
    stat.parent.mkdir()
    own = stat.parent / "self" / "task" / "7" / "stat"
    own.parent.mkdir(parents=True)
    own.write_text("7 (a ) R name) R 1 1 0\n")
    stat.write_text("cpu 0 0 0 0 0 0 0 0 0 0\nprocs_running 1\n")
    meter = ContentionMeter(root=tmp_path)
    meter.start()
    stat.write_text("cpu 300 50 50 500 50 0 0 50 0 0\nprocs_running 5\n")
    contention = meter.stop()
    assert contention.queued == 2.0, "none, then four, beside this process's own thread"
    assert "2.0 threads of other programs ran or waited to" in contention.problem
    assert contention.others == pytest.approx(0.4, abs=0.05)
    assert contention.stolen == 0.05
    assert "5%" in contention.problem
    assert Contention().problem == ""
    stat.unlink()
    assert ContentionMeter(root=tmp_path).stop() == Contention()


def test_host_share() -> None:
    assert StageMedians(preprocess=1.0, infer=8.0, decode=1.0).host_share == pytest.approx(0.2)


def test_json_has_the_keys_that_others_rely_on() -> None:
    (entry,) = json.loads(json.dumps(benchmark_json(benchmark(result())), allow_nan=False))
    assert (entry["backend"], entry["precision"], entry["throughput_fps"]) == ("openvino", "int8", 90.0)
    assert {"mean", "p50", "p90", "p99"} <= set(entry["latency_ms"])
    assert {"preprocess", "infer", "decode"} <= set(entry["stages_ms"])
    assert entry["power"] == {"watts": None, "source": "", "problem": "none"}


def test_slower_than_the_baseline_is_exit_4(tmp_path: Path) -> None:
    save_benchmark(tmp_path / "b.json", benchmark(result(times=10.0)))
    earlier = read_baseline(tmp_path / "b.json")
    same = compare_with_baseline(benchmark(result(times=10.5)), earlier)
    require_no_slowdown(same, tolerance=0.1)
    slower = compare_with_baseline(benchmark(result(times=15.0)), earlier)
    with pytest.raises(SlowdownError, match=r"openvino int8: p50 11.00 -> 16.00 ms \(1.45 times\)") as caught:
        require_no_slowdown(slower, tolerance=0.1)
    assert caught.value.exit_code == 4


def test_a_slower_median_with_the_same_fastest_time_is_other_load(tmp_path: Path) -> None:
    save_benchmark(tmp_path / "b.json", benchmark(result(times=10.0)))
    busy = replace(result(), latency=LatencyStats.of(np.array([10.0, 30.0, 40.0])))
    require_no_slowdown(compare_with_baseline(benchmark(busy), read_baseline(tmp_path / "b.json")), tolerance=0.1)


def test_several_models_on_one_backend_are_compared_in_their_order(tmp_path: Path) -> None:
    save_benchmark(tmp_path / "b.json", benchmark(result(times=10.0), result("onnxruntime"), result(times=20.0)))
    earlier = read_baseline(tmp_path / "b.json")
    found = compare_with_baseline(benchmark(result(times=10.0), result(times=30.0)), earlier)
    assert [(c.before["minimum"], c.now.minimum) for c in found] == [(10.0, 10.0), (20.0, 30.0)]
    with pytest.raises(ConfigError, match="nothing to compare 'openvino int8' with"):
        compare_with_baseline(benchmark(result(), result(), result(times=5.0)), earlier)


def test_baselines_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    save_benchmark(tmp_path / "b.json", benchmark(result("openvino")))
    earlier = read_baseline(tmp_path / "b.json")
    with pytest.raises(ConfigError, match="nothing to compare 'tensorrt int8' with; it has 'openvino int8'"):
        compare_with_baseline(benchmark(result("openvino"), result("tensorrt")), earlier)
    with pytest.raises(ConfigError, match="measured on 'P', this machine is 'Q'"):
        compare_with_baseline(benchmark(result("openvino"), processor="Q"), earlier)
    threaded = replace(result("openvino"), session={"backend": "openvino", "threads": "2", "version": "1"})
    save_benchmark(tmp_path / "t.json", benchmark(threaded))
    other = replace(threaded, session={"backend": "openvino", "threads": "4", "version": "2"})
    with pytest.raises(ConfigError, match=r"measured otherwise: threads 2 then, 4 now\.") as caught:
        compare_with_baseline(benchmark(other), read_baseline(tmp_path / "t.json"))
    assert "--threads" in caught.value.hint
    for wrong in ("NaN", "0", "null", '"1"', "Infinity"):
        text = (tmp_path / "b.json").read_text().replace('"p50": 11.0', f'"p50": {wrong}')
        (tmp_path / "c.json").write_text(text)
        with pytest.raises(ConfigError, match="not a benchmark"):
            read_baseline(tmp_path / "c.json")
    with pytest.raises(ConfigError, match="Cannot read"):
        read_baseline(tmp_path / "gone.json")


def write(root: Path, path: str, text: str) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text + "\n")


def test_machine_that_tells_everything(tmp_path: Path) -> None:
    for core, khz in ((0, "3000000"), (1, "2000000")):
        write(tmp_path, f"sys/devices/system/cpu/cpu{core}/cpufreq/scaling_cur_freq", khz)
        write(tmp_path, f"sys/devices/system/cpu/cpu{core}/thermal_throttle/core_throttle_count", "3")
    clock = read_clock(tmp_path)
    assert (clock.mhz, clock.throttled, clock.problem) == (2500.0, 6, "")


def test_machine_that_tells_nothing_says_so(tmp_path: Path) -> None:
    clock = read_clock(tmp_path)
    assert clock.mhz is None
    assert clock.throttled is None
    assert "no throttle counters" in clock.problem
    meter = PowerMeter(tmp_path)
    meter.start()
    reading = meter.stop()
    assert reading.watts is None
    assert "RAPL" in reading.problem


def test_power_from_rapl_survives_the_counters_wrap(tmp_path: Path) -> None:
    folder = "sys/class/powercap/intel-rapl:0"
    write(tmp_path, f"{folder}/energy_uj", "9000000")
    write(tmp_path, f"{folder}/max_energy_range_uj", "10000000")
    meter = PowerMeter(tmp_path)
    meter.start()
    write(tmp_path, f"{folder}/energy_uj", "1000000")
    meter._started -= 2.0
    reading = meter.stop()
    assert reading.source == "RAPL packages"
    assert reading.watts == pytest.approx(1.0, rel=0.05)  # 2 J in 2 s


def test_power_of_a_jetson(tmp_path: Path) -> None:
    write(tmp_path, "sys/class/hwmon/hwmon1/name", "ina3221")
    for channel, (volts, amperes) in enumerate(((5000, 1000), (19000, 500)), start=1):
        write(tmp_path, f"sys/class/hwmon/hwmon1/in{channel}_input", str(volts))
        write(tmp_path, f"sys/class/hwmon/hwmon1/curr{channel}_input", str(amperes))
    meter = PowerMeter(tmp_path)
    meter.start()
    reading = meter.stop()
    assert (reading.source, reading.watts) == ("INA3221", pytest.approx(14.5))


@pytest.mark.parametrize(
    ("milliseconds", "rounds"),
    [
        ([10.0, 10.4, 10.0, 10.2, 10.0, 10.0], 5),
        ([10.0, 11.5, 10.0, 11.5, 10.0, 10.0], 6),  # Quartiles that lie 1.15 times apart may still move.
        ([10.0, 10.0, 5.0, 10.0, 10.0, 10.0], 6),  # The fastest rounds say 2.0 times, the quartiles 1.0.
    ],
)
def test_rounds_go_on_until_quartiles_are_near_each_other_and_the_ratio_of_the_fastest_is_near_them(
    monkeypatch: pytest.MonkeyPatch, milliseconds: list[float], rounds: int
) -> None:
    def time_block(detector: list[float], _: object, *, block: int, timing: measure.Timing) -> None:
        timing.rounds.append(detector[len(timing.rounds)])

    monkeypatch.setattr(measure, "_time_block", time_block)
    detectors: Any = [[10.0] * 6, milliseconds]  # Each is the times of its rounds.
    options = measure.TimingOptions(rounds=6, warmup=0, settled_after=5)
    timings = measure.time_in_turns(detectors, np.zeros((1, 1, 3), np.uint8), options=options)
    assert [len(timing.rounds) for timing in timings] == [rounds, rounds]


def test_size_counts_what_belongs_together(tmp_path: Path) -> None:
    for name, size in (("m.xml", 3), ("m.bin", 40), ("other.bin", 500)):
        (tmp_path / name).write_bytes(bytes(size))
    assert model_bytes(tmp_path / "m.xml") == 43
    assert model_bytes(tmp_path) == 543


def test_the_image_that_comes_along_can_be_read_and_its_absence_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert read_image(demo_image()).shape[2] == 3
    monkeypatch.setattr("fcos_deploy.benchmark.run.__file__", str(tmp_path / "benchmark" / "run.py"))
    with pytest.raises(ConfigError, match="no demo images"):
        demo_image()
