"""From a bundle to the files that serving engines read."""

from fcos_deploy.serving.package import ServingOptions, package_bundle, packagers

__all__ = ["ServingOptions", "package_bundle", "packagers"]
