"""Maps ImageNet's 1,000 classes to the classes of PASCAL VOC and COCO: a dog is any of 118 breeds.

Classes of those sets that no ImageNet class is (person, giraffe, knife ...) are left out: a network
that knows only ImageNet's cannot name them.
"""

from collections.abc import Sequence
from functools import cache

from engines.networks.registry import imagenet_classes

_BALLS = (430, 522, 574, 722, 768, 805, 852, 890)
KNOWN: dict[str, Sequence[int]] = {
    "dog": range(151, 269),
    "cat": range(281, 286),
    "horse": (339,),
    "sheep": (348, 349),
    "cow": (345, 346),
    "elephant": (101, 385, 386),
    "zebra": (340,),
    "bear": range(294, 298),
    "bird": (*range(7, 25), *range(80, 101), *range(127, 147)),
    "car": (407, 436, 468, 511, 609, 627, 656, 661, 751, 817),
    "bus": (654, 779, 874),
    "truck": (555, 569, 675, 717, 864, 867),
    "bicycle": (444, 671),
    "motorcycle": (665, 670),
    "motorbike": (665, 670),
    "airplane": (404, 895),
    "aeroplane": (404, 895),
    "boat": (472, 484, 554, 576, 625, 780, 814, 871, 914),
    "train": (466, 547, 705, 820),
    "traffic light": (920,),
    "bench": (703,),
    "umbrella": (879,),
    "backpack": (414,),
    "tie": (457, 906),
    "sports ball": _BALLS,
    "skis": (795,),
    "tennis racket": (752,),
    "bottle": (440, 737, 898, 907),
    "wine glass": (572,),
    "cup": (504, 968),
    "bowl": (659, 809),
    "banana": (954,),
    "orange": (950,),
    "broccoli": (937,),
    "hot dog": (934,),
    "pizza": (963,),
    "chair": (423, 559, 765),
    "couch": (831,),
    "sofa": (831,),
    "potted plant": (738,),
    "pottedplant": (738,),
    "bed": (564,),
    "dining table": (532,),
    "diningtable": (532,),
    "toilet": (861,),
    "tv": (851,),
    "tvmonitor": (664, 851),
    "laptop": (620, 681),
    "mouse": (673,),
    "remote": (761,),
    "keyboard": (508,),
    "cell phone": (487,),
    "microwave": (651,),
    "oven": (827,),
    "toaster": (859,),
    "sink": (896,),
    "refrigerator": (760,),
    "clock": (409, 530, 892),
    "vase": (883,),
    "teddy bear": (850,),
    "stop sign": (919,),
}


@cache
def everyday_names(names: tuple[str, ...], wanted: frozenset[str]) -> tuple[str, ...]:
    """For each class of a network, what a data set calls it: '' where it has no such class.

    Args:
        names: of the network's classes; ImageNet's are translated, any other stand for themselves.
        wanted: the classes of the data set.
    """
    if names != tuple(name for _, name in imagenet_classes()):
        return tuple(name if name in wanted else "" for name in names)
    index = {i: name for name, indices in KNOWN.items() if name in wanted for i in indices}
    return tuple(index.get(i, name if name in wanted else "") for i, name in enumerate(names))
