"""Artifacts for devices that this machine is not: the graphs to build from, and engines that can be built ahead."""

from __future__ import annotations

from fcos_deploy.bundle import Artifact
from fcos_deploy.core.device_plan import Plan, PlanRequest, plan
from fcos_deploy.core.devices import load_profile
from fcos_deploy.core.enums import Precision
from fcos_deploy.core.errors import ConfigError
from fcos_deploy.pipeline.steps import Workshop, build, calibrate, export, quantize

__all__ = ["make_for_target", "plan_targets"]


def plan_targets(
    names: tuple[str, ...], *, backend: str = "", input_size: tuple[int, int] | None = None
) -> tuple[Plan, ...]:
    """What each device profile gets; ``backend`` and ``input_size`` (height, width) replace the profile's choice.

    Raises:
        ConfigError: an unknown profile, a plan that cannot work there, with the rule that forbids it, or a profile that
            wants another batch than the graphs of a bundle have.
    """
    request = PlanRequest(backend=backend, input_size=input_size or PlanRequest().input_size)
    profiles = [load_profile(name) for name in names]
    for profile in profiles:
        if profile.batch != 1:
            raise ConfigError(
                f"Profile '{profile.name}' wants batches of {profile.batch}; the graphs of a bundle take one image.",
                hint=f"set its batch to 1, or: fcos-deploy export --batch {profile.batch}, then build --target",
            )
    return tuple(plan(profile, request) for profile in profiles)


def make_for_target(shop: Workshop, wanted: Plan) -> list[Artifact]:
    """The graph with the plan's tail and precision and, where the builder needs no device, the engine.

    Raises:
        AccuracyGateError: INT8 cannot hold the accuracy goal.
    """
    float_precision = wanted.precision if wanted.precision is not Precision.INT8 else Precision.FP32
    graph = export(shop, tail=wanted.tail, precision=float_precision, nms_form=wanted.nms_form)
    if wanted.precision is Precision.INT8:
        calibrated = calibrate(shop, graph)
        graph = quantize(shop, graph, calibrated=calibrated, consumer=wanted.placement)
    engines = [a for a in wanted.artifacts if a.where == "here" and a.kind is not graph.artifact.kind]
    made = [graph.artifact]
    for _ in engines:
        made.append(build(shop, graph, backend=wanted.backend, options=wanted.options).artifact)
    return made
