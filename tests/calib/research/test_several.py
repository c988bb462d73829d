"""The count of several followed objects against hand arithmetic."""

from calib.research.several import Count, counted
from realtime.frames import Track, Tracked

LEFT, RIGHT = (0.0, 0.0, 10.0, 10.0), (50.0, 0.0, 60.0, 10.0)


def tracked(number, box):
    return Tracked(box, 0, "cat", 0.5, Track("following", LEFT, 0.9, number, box))


def test_objects_numbers_and_boxes_that_are_nowhere_are_counted():
    count = Count()
    followed = [
        [tracked(1, LEFT), tracked(2, RIGHT)],  # both right
        [
            tracked(1, LEFT),
            tracked(3, (0.0, 1.0, 10.0, 11.0)),
        ],  # the second box of the left one is nobody's
        [tracked(4, RIGHT), tracked(1, None)],  # the right one is back under another number
        [],
    ]
    counted([[LEFT, RIGHT]] * 4, followed, count)
    assert count == Count(frames=4, all_right=1, objects=8, right=4, nowhere=1, switches=1)


def test_where_two_boxes_could_be_right_the_closer_one_is():
    count = Count()
    counted(
        [[LEFT], [LEFT]],
        [[tracked(1, LEFT)], [tracked(2, (0.0, 2.0, 10.0, 12.0)), tracked(1, LEFT)]],
        count,
    )
    assert (count.right, count.nowhere, count.switches) == (2, 1, 0)
