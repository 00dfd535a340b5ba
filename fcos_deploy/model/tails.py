"""The network as it is exported: normalisation in front, one of the three tails behind (design, section 5)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fcos_deploy.core.contract import ModelContract
from fcos_deploy.core.decode_spec import BoxClip, NmsSpace, PostprocessProfile
from fcos_deploy.core.enums import Tail
from fcos_deploy.core.preprocess_spec import InputDtype, PreprocessSpec
from fcos_deploy.model.candidates import Candidates, select_candidates
from fcos_deploy.model.fcos import flatten_levels
from fcos_deploy.model.head import LevelOutput
from fcos_deploy.model.suppress import GreedyNms, Suppression, suppress

__all__ = ["ExportableFcos", "needs_image_sizes"]


def needs_image_sizes(contract: ModelContract) -> bool:
    """Whether the graph has the second input ``image_sizes`` (``ModelContract``, tail nms)."""
    profile = contract.decode.profile
    in_image_pixels = profile.clip is not BoxClip.NONE or profile.nms_space is not NmsSpace.INPUT
    return contract.tail is Tail.NMS and in_image_pixels


class ExportableFcos(nn.Module):
    """``model`` between the contract's input tensor and the outputs of the contract's tail.

    ``model`` maps normalised images (n, 3, H, W) float32 to one ``LevelOutput`` a level. ``suppression`` is how the
    nms tail suppresses; ``with_raw`` appends the raw tail's outputs to those of the other two.
    """

    def __init__(
        self,
        model: nn.Module,
        contract: ModelContract,
        *,
        suppression: Suppression | None = None,
        with_raw: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.contract = contract
        self.normalize = _Normalize(contract.preprocess)
        self._suppression = GreedyNms() if suppression is None else suppression
        self._with_raw = with_raw and contract.tail is not Tail.RAW

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the arguments of ``forward``."""
        return ("images", "image_sizes") if needs_image_sizes(self.contract) else ("images",)

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of the tensors that ``forward`` returns."""
        raw = ("cls_logits", "distances", "centerness") if self._with_raw else ()
        return (*self.contract.outputs, *raw)

    def forward(self, images: Tensor, image_sizes: Tensor | None = None) -> tuple[Tensor, ...]:
        """Images (n, 3, H, W) in the contract's input dtype -> the tensors that ``contract.outputs`` names.

        image_sizes: (n, 4) float32, resized height and width, original height and width; only where
        ``needs_image_sizes``.
        """
        levels: Sequence[LevelOutput] = self.model(self.normalize(images))
        height, width = images.shape[2], images.shape[3]
        tail = _TAILS[self.contract.tail](self, list(levels), (height, width), image_sizes)
        return (*tail, *flatten_levels(list(levels))) if self._with_raw else tail

    def _raw(
        self, levels: list[LevelOutput], _input_size: tuple[int, int], _image_sizes: Tensor | None
    ) -> tuple[Tensor, ...]:
        return flatten_levels(levels)

    def _candidates(
        self, levels: list[LevelOutput], input_size: tuple[int, int], _image_sizes: Tensor | None
    ) -> tuple[Tensor, ...]:
        found = self._select(levels, input_size)
        return found.boxes, found.scores, found.labels.to(torch.int32)

    def _nms(
        self, levels: list[LevelOutput], input_size: tuple[int, int], image_sizes: Tensor | None
    ) -> tuple[Tensor, ...]:
        return suppress(
            self._select(levels, input_size), image_sizes, spec=self.contract.decode, suppression=self._suppression
        )

    def _select(self, levels: list[LevelOutput], input_size: tuple[int, int]) -> Candidates:
        return select_candidates(levels, input_size, spec=self.contract.decode)

    @property
    def profile(self) -> PostprocessProfile:
        """The post-processing that the tail follows."""
        return self.contract.decode.profile


_TailFn = Callable[[ExportableFcos, list[LevelOutput], tuple[int, int], "Tensor | None"], tuple[Tensor, ...]]
_TAILS: dict[Tail, _TailFn] = {
    Tail.RAW: ExportableFcos._raw,
    Tail.CANDIDATES: ExportableFcos._candidates,
    Tail.NMS: ExportableFcos._nms,
}


class _Normalize(nn.Module):
    """``(pixel / pixel_scale - mean) / std`` for uint8 input; float32 input was normalised by the host."""

    mean: Tensor
    inverse_std: Tensor

    def __init__(self, spec: PreprocessSpec) -> None:
        super().__init__()
        self._in_graph = spec.input_dtype is InputDtype.UINT8
        mean = torch.tensor(spec.mean, dtype=torch.float64) * spec.pixel_scale
        inverse_std = 1.0 / (torch.tensor(spec.std, dtype=torch.float64) * spec.pixel_scale)
        self.register_buffer("mean", mean.to(torch.float32).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("inverse_std", inverse_std.to(torch.float32).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """(n, 3, H, W) as the contract has it -> (n, 3, H, W) float32, normalised."""
        if not self._in_graph:
            return images
        return (images.to(torch.float32) - self.mean) * self.inverse_std
