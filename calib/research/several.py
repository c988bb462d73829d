"""Measures the tracking of several objects: ``python -m calib.research.several --data DATA``.

Clips are made of the second half of the training photos (``calib.research.clips.crowds``), because
the settings of tracking were chosen on clips of the first half. A box is right if its IoU is over
0.5. A switch is an object that is right again under another track id (Bernardin & Stiefelhagen,
"Evaluating Multiple Object Tracking Performance: The CLEAR MOT Metrics", 2008).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from rich.progress import track
from rich.table import Table

from calib.data.datasets import load_dataset
from calib.evaluation.metrics import CORLOC_IOU
from calib.evaluation.sequences import follow_frame
from calib.research.clips import Crowd, crowds
from calib.research.command_line import run
from engines.boxes import overlap
from engines.choose import open_localizer
from engines.localizer import Localizer
from engines.options import Option
from engines.text import Terminal
from realtime.frames import BoxPx, Tracked
from realtime.sources.spec import open_source
from realtime.tracking.confidence import load_confidence_model
from realtime.tracking.tracker import Tracker

RATE_FPS = 24.0
LEAD_S = 0.6
"""The time that trackers may take to find all objects."""
BACKGROUNDS = 200
Objects = Sequence[Tracked]


@dataclass
class Count:
    """What is counted over frames.

    Attributes:
        frames: their number.
        all_right: frames in which every object has a right box.
        objects: over all frames.
        right: those of them with a right box.
        nowhere: boxes that are right for no object.
        switches: of track ids.
    """

    frames: int = 0
    all_right: int = 0
    objects: int = 0
    right: int = 0
    nowhere: int = 0
    switches: int = 0


def counted(true: Sequence[Sequence[BoxPx]], followed: Sequence[Objects], count: Count) -> None:
    """Add the frames of a clip to a count.

    Args:
        true: the boxes of the objects in each frame.
        followed: the tracked objects of each frame.
        count: it is changed.
    """
    last: dict[int, int] = {}
    for boxes, objects in zip(true, followed, strict=True):
        matched = _matched(boxes, objects)
        count.frames += 1
        count.all_right += len(matched) == len(boxes)
        count.objects += len(boxes)
        count.right += len(matched)
        count.nowhere += sum(each.box_xyxy_px is not None for each in objects) - len(matched)
        count.switches += sum(
            last.get(place, number) != number for place, number in matched.items()
        )
        last |= matched


def _matched(boxes: Sequence[BoxPx], objects: Objects) -> dict[int, int]:
    """The track ids of right boxes, by the place of their object in ``boxes``.

    Each object gets at most one box and each box at most one object, the best pairs first.
    """
    shown = [(each.box_xyxy_px, each.track.track_id) for each in objects if each.box_xyxy_px]
    pairs = [
        (overlap(box, true), place, number)
        for place, true in enumerate(boxes)
        for box, number in shown
    ]
    found: dict[int, int] = {}
    for alike, place, number in sorted(pairs, reverse=True):
        if alike > CORLOC_IOU and place not in found and number not in found.values():
            found[place] = number
    return found


def follow_crowd(crowd: Crowd, localizer: Localizer, most: int) -> list[Objects]:
    """Track the objects of a clip.

    Args:
        crowd: the clip.
        localizer: an engine with a head.
        most: the largest number of objects.

    Returns:
        The tracked objects of each frame.
    """
    height, width = crowd.frames[0].shape[:2]
    tracker = Tracker(width, height, load_confidence_model(), most)
    followed: list[Objects] = []
    for number, frame in enumerate(crowd.frames):
        follow_frame(tracker, localizer, frame, number / RATE_FPS)
        followed.append(tracker.objects)
    return followed


def main(
    data: Annotated[Path, Option("Folder of the data sets.")],
    count: Annotated[int, Option("Clips of each kind.", min=1)] = 24,
) -> None:
    """Measure the tracking of one, two and three objects, and print a table."""
    console = Terminal()
    localizer = open_localizer("lite0")
    with open_source(str(data / "imagenet_sample/images_256.zip")) as photos:
        backgrounds = [
            frame.image_bgr for frame, _ in zip(photos, range(BACKGROUNDS), strict=False)
        ]
    objects = [
        sample for sample in load_dataset(data / "animal_pose_voc/train.csv") if sample.one_box
    ]
    table = Table(title=f"IoU over {CORLOC_IOU}", title_justify="left")
    for name in (
        "objects",
        "all right",
        f"after {LEAD_S} s",
        "right",
        "boxes nowhere",
        "switches a clip",
    ):
        table.add_column(name, justify="right")
    for several in (1, 2, 3):
        whole = Count()
        late = Count()
        start = round(LEAD_S * RATE_FPS)
        made = crowds(
            objects[len(objects) // 2 :], backgrounds[len(backgrounds) // 2 :], count, 1, several
        )
        for crowd in track(made, f"{several} objects", total=count, console=console):
            followed = follow_crowd(crowd, localizer, max(several, 2))
            counted(crowd.boxes, followed, whole)
            counted(crowd.boxes[start:], followed[start:], late)
        shares = [
            whole.all_right / whole.frames,
            late.all_right / late.frames,
            whole.right / whole.objects,
        ]
        table.add_row(
            str(several),
            *(f"{100 * share:.1f} %" for share in shares),
            f"{whole.nowhere / whole.frames:.2f}",
            f"{whole.switches / count:.2f}",
        )
    console.print(table)


if __name__ == "__main__":
    run(main)
