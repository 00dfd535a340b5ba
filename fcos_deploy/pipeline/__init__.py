"""Checkpoint to bundle."""

from fcos_deploy.pipeline.deploy import Deployment, deploy, runnable_backends
from fcos_deploy.pipeline.request import DeployRequest
from fcos_deploy.pipeline.targets import plan_targets

__all__ = ["DeployRequest", "Deployment", "deploy", "plan_targets", "runnable_backends"]
