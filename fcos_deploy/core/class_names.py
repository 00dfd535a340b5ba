"""Names of the classes of published detectors (spec 15)."""

from __future__ import annotations

__all__ = ["COCO_80", "COCO_91", "COCO_IDS"]

_COCO = (
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,parking meter,"
    "bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,tie,suitcase,frisbee,"
    "skis,snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,"
    "cup,fork,knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,"
    "potted plant,bed,dining table,toilet,tv,laptop,mouse,remote,keyboard,cell phone,microwave,oven,toaster,sink,"
    "refrigerator,book,clock,vase,scissors,teddy bear,hair drier,toothbrush"
)
COCO_80: tuple[str, ...] = tuple(_COCO.split(","))

# The category ids that COCO left out when 91 planned classes became 80.
_UNUSED_IDS = frozenset({0, 12, 26, 29, 30, 45, 66, 68, 69, 71, 83})

# COCO category id of each of the 80 contiguous classes.
COCO_IDS: tuple[int, ...] = tuple(i for i in range(91) if i not in _UNUSED_IDS)

_NAME_OF_ID = dict(zip(COCO_IDS, COCO_80, strict=True))

# torchvision's 91 channels are the category ids; channel 0 is the background and never a detection.
COCO_91: tuple[str, ...] = ("background", *(_NAME_OF_ID.get(i, "N/A") for i in range(1, 91)))
