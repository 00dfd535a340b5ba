"""What a TensorRT build reads and works out, without the library: layer lists, profiles, progress, caches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from exporters._tensorrt_build import BuildMonitor, EngineLayer, convolution_inputs, parse_layer_list, timing_cache_file
from exporters._tensorrt_options import ProfileShapes, check_calibration_cache, profile_shapes
from fcos_deploy.core.errors import ConfigError
from fcos_deploy.core.exporter import BatchRange, BuildOptions


def test_layer_list_is_read() -> None:
    """From a build of TensorRT-RTX 1.7.1: one convolution in INT8, one kernel that is none."""
    text = (Path(__file__).parents[1] / "data/tensorrt_layers.txt").read_text()
    layers = parse_layer_list(text)
    assert layers == [EngineLayer("correlation", ("Int8",)), EngineLayer("kgen", ("Float",))]
    assert convolution_inputs([*layers, layers[0]]) == {"Int8": 2}


def test_profile_shapes_by_hand() -> None:
    shapes = profile_shapes(
        {"images": (None, 3, 64, None), "image_sizes": (None, 4)},
        options=BuildOptions(batch=BatchRange(1, 4, 8), width_range=(32, 64, 96)),
        size_divisor=32,
    )
    assert shapes["images"] == ProfileShapes((1, 3, 64, 32), (4, 3, 64, 64), (8, 3, 64, 96))
    assert shapes["image_sizes"] == ProfileShapes((1, 4), (4, 4), (8, 4))
    assert str(shapes["image_sizes"]) == "1x4/4x4/8x4"
    assert ProfileShapes.from_text(str(shapes["images"])) == shapes["images"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": BatchRange(4, 2, 8)}, "The batch range must be"),
        ({"batch": BatchRange(0, 1, 1)}, "The batch range must be"),
        ({"height_range": (64, 64, 64)}, "The width of input 'images' is dynamic"),
        ({"height_range": (64, 65, 96), "width_range": (64, 64, 64)}, "multiples of 32"),
        ({"height_range": (96, 64, 96), "width_range": (64, 64, 64)}, "The height range must be"),
    ],
)
def test_bad_profiles_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        profile_shapes({"images": (None, 3, None, None)}, options=BuildOptions(**options), size_divisor=32)


def test_only_the_outermost_phase_moves_the_bar() -> None:
    seen: list[tuple[str, int, int]] = []
    monitor = BuildMonitor(lambda *step: seen.append(step))
    monitor.phase_start("build", None, 2)
    monitor.phase_start("fuse", "build", 9)
    assert monitor.step_complete("fuse", 0)
    monitor.phase_finish("fuse")
    assert monitor.step_complete("build", 0)
    monitor.stop()
    assert not monitor.step_complete("build", 1)
    assert seen == [("build", 0, 2), ("build", 1, 2), ("build", 2, 2)]


@pytest.mark.parametrize(
    ("content", "version", "message"),
    [
        ("TRT-8602-EntropyCalibration2\nimages: 3caa54fc\n", "10.3.0", "this TensorRT is 100300"),
        ("images: 3caa54fc\n", "10.3.0", "its first line is not"),
        ("", "10.3.0", "its first line is not"),
        ("TRT-100300-EntropyCalibration2\nimages 3caa54fc\n", "10.3.0", "Line 2"),
    ],
)
def test_calibration_caches_that_would_be_ignored_are_refused(
    content: str, version: str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "calibration.cache"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        check_calibration_cache(path, version=version)


@pytest.mark.parametrize(("number", "version"), [("100300", "10.3.0"), ("8602", "8.6.2"), ("101401", "10.14.1.48")])
def test_a_calibration_cache_of_this_version_is_taken(number: str, version: str, tmp_path: Path) -> None:
    path = tmp_path / "calibration.cache"
    path.write_text(f"TRT-{number}-EntropyCalibration2\nimages: 3caa54fc\n/a/relu: 0\n")
    check_calibration_cache(path, version=version)


def test_timing_caches_are_kept_per_device_and_version() -> None:
    folder = Path("timings")
    orin = timing_cache_file(folder, version="10.3.0", devices=["cuda:0 Orin (sm_87)"])
    assert orin == folder / "cuda-0-Orin-sm-87.tensorrt-10.3.0.timing"
    assert timing_cache_file(folder, version="10.3.0", devices=["cuda:0 Thor (sm_110)"]) != orin
    assert timing_cache_file(folder, version="10.13.3", devices=["cuda:0 Orin (sm_87)"]) != orin
    assert timing_cache_file(Path("my.cache"), version="10.3.0", devices=[]) == Path("my.cache")
