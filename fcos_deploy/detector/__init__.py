"""A detector: an image in, boxes out, on whatever runtime."""

from fcos_deploy.detector.detector import Detector, DetectorSpec, Image

__all__ = ["Detector", "DetectorSpec", "Image"]
