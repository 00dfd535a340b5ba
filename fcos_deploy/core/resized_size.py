"""How large a picture is after resizing: each ecosystem's own arithmetic, to the pixel (spec 9)."""

from __future__ import annotations

from collections.abc import Callable

from fcos_deploy.core.preprocess_spec import PreprocessSpec, SizeRule

__all__ = ["padded_size", "resized_size"]

Size = tuple[int, int]  # height, width


def resized_size(height: int, width: int, spec: PreprocessSpec) -> Size:
    """Height and width of an image of the given size after resizing, before padding; at least 1 each."""
    new_height, new_width = _RULES[spec.size_rule](height, width, _target(spec))
    return max(new_height, 1), max(new_width, 1)


def padded_size(height: int, width: int, spec: PreprocessSpec) -> Size:
    """Height and width of the input tensor for an image of the given size."""
    if spec.canvas is not None:
        return spec.canvas
    new_height, new_width = resized_size(height, width, spec)
    return _round_up(new_height, spec.size_divisor), _round_up(new_width, spec.size_divisor)


def _round_up(size: int, divisor: int) -> int:
    return -(-size // divisor) * divisor


def _target(spec: PreprocessSpec) -> Size:
    """Canvas (height, width), or (shortest, longest) edge."""
    if spec.canvas is not None:
        return spec.canvas
    return spec.shortest or 0, spec.longest or 0  # PreprocessSpec has checked that both are there.


def _letterbox(height: int, width: int, target: Size) -> Size:
    scale = min(target[0] / height, target[1] / width)
    return min(int(height * scale + 0.5), target[0]), min(int(width * scale + 0.5), target[1])


def _torchvision(height: int, width: int, target: Size) -> Size:
    shortest, longest = target
    scale = min(shortest / min(height, width), longest / max(height, width))
    return int(height * scale), int(width * scale)


def _mmdetection(height: int, width: int, target: Size) -> Size:
    shortest, longest = target
    scale = min(longest / max(height, width), shortest / min(height, width))
    return int(height * scale + 0.5), int(width * scale + 0.5)


def _detectron2(height: int, width: int, target: Size) -> Size:
    shortest, longest = target
    scale = shortest / min(height, width)
    new_height, new_width = (float(shortest), scale * width) if height < width else (scale * height, float(shortest))
    if max(new_height, new_width) > longest:
        shrink = longest / max(new_height, new_width)
        new_height, new_width = new_height * shrink, new_width * shrink
    return int(new_height + 0.5), int(new_width + 0.5)


def _tianzhi(height: int, width: int, target: Size) -> Size:
    shortest, longest = target
    short_side, long_side = float(min(height, width)), float(max(height, width))
    size = shortest
    if long_side / short_side * size > longest:
        size = round(longest * short_side / long_side)
    if size == short_side:
        return height, width
    if width < height:
        return int(size * height / width), size
    return size, int(size * width / height)


_RULES: dict[SizeRule, Callable[[int, int, Size], Size]] = {
    SizeRule.LETTERBOX: _letterbox,
    SizeRule.TORCHVISION: _torchvision,
    SizeRule.MMDETECTION: _mmdetection,
    SizeRule.DETECTRON2: _detectron2,
    SizeRule.TIANZHI: _tianzhi,
}
