"""Device profiles, plans and the checks before a build."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

from fcos_deploy.bundle import Artifact, Requirements, StepRecord, VersionRule
from fcos_deploy.bundle.selection import preflight
from fcos_deploy.core.artifact import graph_file
from fcos_deploy.core.backend import BackendProbe
from fcos_deploy.core.enums import ArtifactKind, NmsForm, Precision, Tail
from fcos_deploy.core.errors import ConfigError
from fcos_deploy.core.exporter import BuildOptions, SizeRange, all_exporters
from fcos_deploy.core.libraries import parse_version
from fcos_deploy.core.machine import MachineFacts
from fcos_deploy.pipeline.steps import plan_targets
from fcos_deploy.targets.plan import RULES, PlanRequest, plan, trtexec_command
from fcos_deploy.targets.profiles import load_profile, profile_names

HARDWARE_PAGE = Path(__file__).parents[2] / "docs/hardware.md"


@pytest.mark.parametrize("name", profile_names())
def test_every_profile_has_a_plan_and_names_real_backends(name: str) -> None:
    profile = load_profile(name)
    assert profile.name == name
    assert set(profile.backends) <= set(all_exporters())
    made = plan(profile)
    assert made.backend == profile.backends[0]
    assert made.artifacts[0].path == graph_file(Precision.FP32, tail=made.tail)
    assert "never been run on hardware" in made.notes[-1] or profile.verified


@pytest.mark.parametrize("name", profile_names())
def test_every_profile_is_in_the_documentation(name: str) -> None:
    assert f"`{name}`" in HARDWARE_PAGE.read_text()


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_is_in_the_documentation(rule: str) -> None:
    assert f"`{rule}`" in HARDWARE_PAGE.read_text()


def test_jetson_engines_are_built_on_the_jetson() -> None:
    made = plan(load_profile("jetson-orin-nano"), PlanRequest(precision=Precision.INT8))
    engine = made.artifacts[-1]
    assert (engine.path, engine.where) == ("model.int8.tensorrt.engine", "on the device")
    assert made.placement == "portable"
    assert made.options.workspace_mib == 1024
    assert made.commands == ("fcos-deploy setup BUNDLE --backend tensorrt",)
    assert made.trtexec == (
        "trtexec --onnx=model.int8.portable.candidates.onnx --saveEngine=model.int8.tensorrt.engine --skipInference "
        "--stronglyTyped --noTF32 --memPoolSize=workspace:1024"
    )


def test_rtx_engines_are_built_here_for_the_gpu_of_the_profile() -> None:
    made = plan(load_profile("gpu-ada"), PlanRequest(backend="tensorrt-rtx"))
    assert made.artifacts[-1].where == "here"
    assert made.options.compute_capabilities == ("8.9",)
    assert made.options.workspace_mib is None
    assert made.trtexec == ""


def test_xavier_has_trtexec_and_no_python() -> None:
    profile = load_profile("jetson-xavier")
    made = plan(profile)
    assert not profile.runs_python
    assert made.commands == ()
    assert "--buildOnly" in made.trtexec
    assert any("Python 3.8" in note for note in made.notes)


def test_openvino_gets_its_own_placement() -> None:
    assert plan(load_profile("intel-core")).placement == "openvino"
    assert plan(load_profile("intel-core"), PlanRequest(backend="onnxruntime")).placement == "onnxruntime-cpu"


BROKEN_PLANS: list[tuple[str, dict[str, Any], str]] = [
    ("jetson-thor", {"backend": "openvino"}, "backend-on-device"),
    ("jetson-orin-nano", {"backend": "tensorrt-rtx"}, "backend-on-device"),
    ("intel-npu", {"precision": Precision.FP32}, "precision-on-device"),
    ("intel-npu", {"batch": SizeRange(1, 2, 4)}, "static-shapes"),
    ("intel-npu", {"input_size": None}, "static-shapes"),
    ("intel-npu", {"tail": Tail.NMS, "nms_form": NmsForm.ONNX}, "nms-operator"),
    ("gpu-ampere", {"backend": "tensorrt-rtx", "tail": Tail.NMS, "nms_form": NmsForm.ONNX}, "nms-operator"),
    ("gpu-ampere", {"pre_nms_top_k": 5000}, "top-k-limit"),
    ("gpu-ampere", {"input_size": None}, "size-range"),
    ("jetson-agx-orin-jp60", {"opset": 18}, "opset-of-parser"),
    ("jetson-orin-nano", {"opset": 21}, "opset-of-parser"),
    ("jetson-orin-nano", {"dla_core": 0}, "dla"),
    ("jetson-agx-orin-jp7", {"dla_core": 0}, "dla"),
    ("jetson-agx-orin", {"dla_core": 2}, "dla"),
    ("jetson-agx-orin", {"dla_core": 0, "precision": Precision.FP32}, "dla"),
    ("jetson-agx-orin", {"dla_core": 0, "precision": Precision.INT8}, "dla"),
    ("jetson-agx-orin", {"dla_core": 0, "batch": SizeRange(1, 2, 2)}, "dla"),
    ("gpu-ada", {"calibration_cache": True, "precision": Precision.INT8}, "calibrators"),
    ("jetson-orin-nx", {"calibration_cache": True, "precision": Precision.FP16}, "calibrators"),
    ("jetson-orin-nano", {"workspace_mib": 8192}, "workspace"),
]


@pytest.mark.parametrize(("name", "request_fields", "rule"), BROKEN_PLANS)
def test_plan_that_cannot_work_is_refused_with_its_rule(name: str, request_fields: dict[str, Any], rule: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan(load_profile(name), PlanRequest(**request_fields))
    assert f"'{rule}'" in caught.value.hint
    assert caught.value.message.startswith(load_profile(name).title)


@pytest.mark.parametrize(
    ("name", "request_fields", "layers"),
    [
        ("jetson-agx-orin", {"operators": frozenset(("Conv", "GridSample"))}, "GPU: the sampling of deformable"),
        ("jetson-xavier", {"operators": frozenset(("DeformConv",)), "tail": Tail.RAW}, "GPU: deformable convolutions."),
        (
            "jetson-orin-nx",
            {"operators": frozenset(("GroupNormalization", "HardSigmoid"))},
            "GroupNorm, VoVNet's gates",
        ),
        ("jetson-agx-orin", {"operators": frozenset(("Conv",))}, "GPU: the top-k of the tail."),
        (
            "intel-npu",
            {"operators": frozenset(("GridSample", "InstanceNormalization"))},
            "deformable convolutions and Gr",
        ),
        ("jetson-agx-orin", {"operators": frozenset(("Conv",)), "tail": Tail.RAW}, ""),
        ("intel-npu", {"operators": frozenset(("Conv", "TopK"))}, ""),
        ("jetson-orin-nano", {"operators": frozenset(("GridSample",))}, ""),  # it has no DLA
        ("intel-arc", {"operators": frozenset(("GridSample",))}, ""),
    ],
)
def test_a_plan_names_the_layers_that_fall_back(name: str, request_fields: dict[str, Any], layers: str) -> None:
    planned = plan(load_profile(name), PlanRequest(**request_fields))
    assert bool(planned.fallback) == bool(layers)
    assert layers in planned.fallback
    assert (planned.fallback in planned.notes) == bool(layers)


def test_every_rule_has_a_plan_that_it_forbids() -> None:
    assert {rule for _, _, rule in BROKEN_PLANS} == set(RULES)


@pytest.mark.parametrize(
    ("name", "request_fields"),
    [
        ("jetson-orin-nano", {"tail": Tail.NMS, "nms_form": NmsForm.ONNX}),
        ("gpu-ampere", {"tail": Tail.NMS, "nms_form": NmsForm.STATIC}),
        ("jetson-thor", {"opset": 21}),
        ("jetson-agx-orin", {"dla_core": 1}),
        ("jetson-agx-orin", {"dla_core": 0, "precision": Precision.INT8, "calibration_cache": True}),
        ("jetson-orin-nano", {"batch": SizeRange(1, 2, 4)}),
    ],
)
def test_plan_beside_the_rule_is_allowed(name: str, request_fields: dict[str, Any]) -> None:
    assert plan(load_profile(name), PlanRequest(**request_fields)).profile.name == name


@pytest.mark.parametrize(
    ("name", "request_fields", "form"),
    [
        ("jetson-agx-orin-jp60", {}, NmsForm.ONNX),
        ("jetson-thor", {"precision": Precision.INT8}, NmsForm.ONNX),
        ("gpu-ada", {}, NmsForm.ONNX),
        ("gpu-ada", {"backend": "tensorrt-rtx"}, NmsForm.STATIC),
        ("intel-npu", {}, NmsForm.STATIC),
        ("intel-core", {}, NmsForm.ONNX),
    ],
)
def test_nms_tail_has_the_form_that_suits_the_target(name: str, request_fields: dict[str, Any], form: NmsForm) -> None:
    made = plan(load_profile(name), PlanRequest(tail=Tail.NMS, **request_fields))
    assert made.nms_form is form
    assert made.artifacts[0].how == f"export, tail nms in its {form} form"


def test_dynamic_batch_becomes_three_shapes() -> None:
    request = PlanRequest(batch=SizeRange(1, 2, 4), input_size=(320, 416))
    line = plan(load_profile("jetson-agx-orin"), request).trtexec
    assert re.findall(r"--(...)Shapes=(\S+)", line) == [
        ("min", "images:1x3x320x416"),
        ("opt", "images:2x3x320x416"),
        ("max", "images:4x3x320x416"),
    ]


@pytest.mark.parametrize(("image_sizes", "rows"), [(True, ",image_sizes:{}x4"), (False, "")])
def test_every_input_of_the_nms_tail_has_shapes(image_sizes: bool, rows: str) -> None:
    request = PlanRequest(
        tail=Tail.NMS,
        batch=SizeRange(1, 2, 4),
        input_size=(320, 416),
        image_sizes=image_sizes,
        precision=Precision.FP16,
    )
    line = plan(load_profile("jetson-agx-orin"), request).trtexec
    assert re.findall(r"--(...)Shapes=(\S+)", line) == [
        (label, f"images:{n}x3x320x416{rows.format(n)}") for label, n in (("min", 1), ("opt", 2), ("max", 4))
    ]


def trtexec(version: str, precision: Precision, **options: Any) -> str:
    options = {"shapes": {}, "options": BuildOptions(), **options}
    files = {"onnx": PurePosixPath("m.onnx"), "engine": PurePosixPath("m.engine")}
    return trtexec_command(version=version, precision=precision, **files, **options)


@pytest.mark.parametrize(
    ("version", "precision", "flags"),
    [
        ("8.5.2", Precision.FP32, "--buildOnly --noTF32"),
        ("8.5.2", Precision.FP16, "--buildOnly --fp16 --noTF32"),
        ("8.6.2", Precision.INT8, "--skipInference --int8 --noTF32"),
        ("10.3.0", Precision.INT8, "--skipInference --stronglyTyped --noTF32"),
        ("11.4.0", Precision.INT8, "--skipInference --noTF32"),
    ],
)
def test_types_of_the_graph_are_kept_by_every_version(version: str, precision: Precision, flags: str) -> None:
    assert trtexec(version, precision) == f"trtexec --onnx=m.onnx --saveEngine=m.engine {flags}"


def test_calibration_cache_and_dla_are_weakly_typed_up_to_10() -> None:
    options = BuildOptions(calibration_cache=Path("c.cache"), dla_core=1)
    line = trtexec("10.3.0", Precision.FP32, options=options)
    assert line.endswith("--fp16 --int8 --calib=c.cache --noTF32 --useDLACore=1 --allowGPUFallback")
    with pytest.raises(ConfigError, match="no calibrators"):
        trtexec("11.4.0", Precision.FP32, options=options)


def test_every_build_option_that_trtexec_has_is_on_its_line() -> None:
    options = BuildOptions(
        tf32=True,
        workspace_mib=512,
        optimization_level=4,
        timing_cache=Path("t.cache"),
        dla_core=0,
        dla_strict=True,
        version_compatible=True,
        hardware_compatible=True,
    )
    assert trtexec("10.3.0", Precision.FP16, options=options).split()[4:] == [
        "--fp16",
        "--memPoolSize=workspace:512",
        "--builderOptimizationLevel=4",
        "--timingCacheFile=t.cache",
        "--useDLACore=0",
        "--versionCompatible",
        "--hardwareCompatibilityLevel=ampere+",
    ]


@pytest.mark.parametrize(
    ("version", "options", "missing"),
    [
        ("8.5.2", BuildOptions(optimization_level=3), "--builderOptimizationLevel"),
        ("8.5.2", BuildOptions(version_compatible=True), "--versionCompatible"),
        ("8.5.2", BuildOptions(hardware_compatible=True), "--hardwareCompatibilityLevel"),
        ("8.2.1", BuildOptions(workspace_mib=64), "--memPoolSize"),
    ],
)
def test_options_that_the_versions_trtexec_does_not_have_are_refused(
    version: str, options: BuildOptions, missing: str
) -> None:
    with pytest.raises(ConfigError, match=f"TensorRT {version} has no option '{missing}'"):
        trtexec(version, Precision.FP16, options=options)
    assert missing in trtexec("10.3.0", Precision.FP16, options=options)


def test_unknown_profile_names_the_ones_there_are() -> None:
    with pytest.raises(ConfigError, match="no device profile 'jetson-nano'") as caught:
        load_profile("jetson-nano")
    assert "jetson-orin-nano" in caught.value.hint


def test_own_profile_from_a_file(tmp_path: Path) -> None:
    shipped = Path(__file__).parents[2] / "fcos_deploy/targets/devices/jetson-orin-nano.toml"
    own = tmp_path / "board.toml"
    own.write_text(shipped.read_text().replace("jetson-orin-nano", "my-board").replace("8192", "4096"))
    assert load_profile(str(own)).memory_mib == 4096


def test_profile_of_another_batch_than_a_bundle_has_is_refused(tmp_path: Path) -> None:
    shipped = (Path(__file__).parents[2] / "fcos_deploy/targets/devices/gpu-ampere.toml").read_text()
    own = tmp_path / "board.toml"
    own.write_text(shipped.replace("batch = 1", "batch = 4"))
    assert plan(load_profile(str(own))).options.batch == SizeRange(4, 4, 4)
    with pytest.raises(ConfigError, match="needs batches of 4; the graphs of a bundle take one image") as caught:
        plan_targets((str(own),))
    assert "export --batch 4" in caught.value.hint
    own.write_text(shipped)
    assert [made.options.batch for made in plan_targets((str(own),))] == [SizeRange(1, 1, 1)]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[nvidia]", '[intel]\ndevice = "GPU"\n\n[nvidia]', "'nvidia' and 'intel', and only one"),
        ('precision = "fp16"', 'precision = "int4"', "precision must be one of"),
        ("memory_mib = 8192", 'memory_mib = "8 GB"', "memory_mib must be int"),
        ("memory_mib = 8192", "memory_gib = 8", "unknown keys"),
        ("memory_mib = 8192", "memory_mib =", "Cannot read the device profile"),
        ('precisions = ["fp32", "fp16", "int8"]', 'precisions = ["fp32"]', "does not list"),
    ],
)
def test_wrong_profile_is_refused(old: str, new: str, message: str, tmp_path: Path) -> None:
    shipped = (Path(__file__).parents[2] / "fcos_deploy/targets/devices/jetson-orin-nano.toml").read_text()
    assert old in shipped
    own = tmp_path / "board.toml"
    own.write_text(shipped.replace(old, new))
    with pytest.raises(ConfigError, match=message):
        load_profile(str(own))


def test_jetsons_know_their_jetpack() -> None:
    for name in profile_names():
        profile = load_profile(name)
        if profile.nvidia is not None and profile.nvidia.jetpack:
            assert profile.nvidia is not None
            assert profile.nvidia.jetpack
            assert profile.nvidia.l4t


@pytest.mark.parametrize(
    ("text", "numbers"), [("10.13.3.9", (10, 13, 3, 9)), ("2.13.0+cpu", (2, 13, 0)), ("8.6.1.post1", (8, 6, 1))]
)
def test_version_numbers(text: str, numbers: tuple[int, ...]) -> None:
    assert parse_version(text) == numbers


def test_what_is_no_version_is_refused() -> None:
    with pytest.raises(ConfigError, match="'latest' is not a version"):
        parse_version("latest")


MACHINE = MachineFacts(
    machine="aarch64",
    processor="ARMv8",
    cpu_features=("asimd", "fp16"),
    system="Linux",
    gpus=(("Orin", "8.7"),),
    nvidia_driver="540.3.0",
)
PROBE = BackendProbe(available=True, version="10.3.0", devices=("cuda:0 Orin",))


def _differences(requires: Requirements, *, probe: BackendProbe = PROBE) -> list[str]:
    return [*preflight(_artifact(requires), probe=probe, machine=MACHINE)]


def _artifact(requires: Requirements) -> Artifact:
    return Artifact(
        path="m.engine",
        kind=ArtifactKind.TENSORRT_ENGINE,
        precision=Precision.INT8,
        sha256="0" * 64,
        size=1,
        step=StepRecord(name="build"),
        requires=requires,
    )


def test_what_asks_for_nothing_fits() -> None:
    assert _differences(Requirements()) == []


def test_what_fits_in_everything_fits() -> None:
    requires = Requirements(
        backend_version="10.3.0",
        compute_capabilities=("8.6", "8.7"),
        driver="535",
        machine="aarch64",
        cpu_features=("asimd",),
        device="cuda",
    )
    assert _differences(requires) == []


@pytest.mark.parametrize(
    ("requires", "message"),
    [
        (Requirements(backend_version="10.3.1"), "the runtime's version must be 10.3.1, it is 10.3.0"),
        (Requirements(backend_version="11.0", version_rule=VersionRule.SAME_MAJOR), r"11.0 (same major), it is 10.3.0"),
        (Requirements(backend_version="10.4", version_rule=VersionRule.AT_LEAST), "10.4 or newer, it is 10.3.0"),
        (Requirements(compute_capabilities=("8.6",)), "capability must be 8.6, it is 8.7 (Orin)"),
        (Requirements(compute_capabilities=("9.0",), hardware_compatible=True), "9.0 or newer"),
        (Requirements(driver="550.54"), "the NVIDIA driver must be 550.54 or newer, it is 540.3.0"),
        (Requirements(machine="x86_64"), "architecture must be x86_64, it is aarch64"),
        (Requirements(cpu_features=("avx512_vnni", "asimd")), "one with avx512_vnni, it is ARMv8, without"),
        (Requirements(device="GPU"), "the device must be GPU, it is cuda:0 Orin"),
    ],
)
def test_what_differs_is_named_with_both_values(requires: Requirements, message: str) -> None:
    (found,) = _differences(requires)
    assert message in found


@pytest.mark.parametrize(
    "requires",
    [
        Requirements(backend_version="10.0", version_rule=VersionRule.SAME_MAJOR),
        Requirements(backend_version="9.9", version_rule=VersionRule.AT_LEAST),
        Requirements(compute_capabilities=("8.0",), hardware_compatible=True),
        Requirements(driver="540.3"),
    ],
)
def test_newer_is_accepted_where_the_rule_says_so(requires: Requirements) -> None:
    assert _differences(requires) == []


def test_version_10_is_newer_than_9() -> None:
    requires = Requirements(backend_version="9.12", version_rule=VersionRule.AT_LEAST)
    assert _differences(requires, probe=dataclasses.replace(PROBE, version="10.1")) == []


def test_everything_is_told_at_once() -> None:
    found = _differences(Requirements(backend_version="8", machine="x86_64", compute_capabilities=("7.5",)))
    assert len(found) == 3


def test_a_missing_runtime_is_all_that_is_told() -> None:
    probe = BackendProbe(available=False, problem="'tensorrt' is not installed")
    (found,) = _differences(Requirements(machine="x86_64"), probe=probe)
    assert "installed" in found


def test_a_machine_whose_gpu_is_gone_is_told_as_one_without() -> None:
    artifact = _artifact(Requirements(compute_capabilities=("8.7",)))
    gone = dataclasses.replace(MACHINE, gpus=())
    (found,) = preflight(artifact, probe=PROBE, machine=gone)
    assert found == "the GPU's compute capability must be 8.7, it is no NVIDIA GPU"
