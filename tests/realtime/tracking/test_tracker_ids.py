"""Track ids: which objects get a new one, and which the one that they had."""

from realtime.tracking.tracker import TrackIds

HERE, NEARBY, FAR = (0.0, 0.0, 10.0, 10.0), (5.0, 0.0, 15.0, 10.0), (200.0, 0.0, 210.0, 10.0)


def test_what_is_found_soon_has_the_number_of_the_nearest_that_was_lost():
    track_ids = TrackIds()
    assert [track_ids.found(HERE, 0.0), track_ids.found(FAR, 0.0)] == [1, 2]
    track_ids.lose(1, HERE, 1.0)
    track_ids.lose(2, FAR, 1.0)
    assert track_ids.found(NEARBY, 1.5) == 1
    assert track_ids.found(NEARBY, 1.5) == 2, "the only one that is left"
    assert track_ids.found(NEARBY, 1.5) == 3


def test_after_two_seconds_it_is_another_one():
    track_ids = TrackIds()
    track_ids.lose(track_ids.found(HERE, 0.0), HERE, 1.0)
    assert track_ids.found(HERE, 3.5) == 2


def test_out_of_reach_it_is_another_one():
    track_ids = TrackIds(reach_px=100)
    track_ids.lose(track_ids.found(HERE, 0.0), HERE, 0.0)
    assert track_ids.found(FAR, 0.1) == 2
    assert track_ids.found(NEARBY, 0.1) == 1
