"""From a bundle to the files that serving engines read."""

from fcos_deploy.serving.package import ServingOptions, all_packagers, package_bundle

__all__ = ["ServingOptions", "all_packagers", "package_bundle"]
