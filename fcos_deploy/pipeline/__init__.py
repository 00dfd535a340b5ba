"""Checkpoint to bundle."""

from fcos_deploy.pipeline.deploy import Deployment, deploy, runnable_backends
from fcos_deploy.pipeline.request import DeployRequest

__all__ = ["DeployRequest", "Deployment", "deploy", "runnable_backends"]
