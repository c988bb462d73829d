"""Numbers: who gets a new one, and who the one that it had."""

from realtime.tracking.geometry import Numbers

HERE, NEARBY, FAR = (0.0, 0.0, 10.0, 10.0), (5.0, 0.0, 15.0, 10.0), (200.0, 0.0, 210.0, 10.0)


def test_what_is_found_soon_has_the_number_of_the_nearest_that_was_lost():
    numbers = Numbers()
    assert [numbers.found(HERE, 0.0), numbers.found(FAR, 0.0)] == [1, 2]
    numbers.lose(1, HERE, 1.0)
    numbers.lose(2, FAR, 1.0)
    assert numbers.found(NEARBY, 1.5) == 1
    assert numbers.found(NEARBY, 1.5) == 2, "the only one that is left"
    assert numbers.found(NEARBY, 1.5) == 3


def test_after_two_seconds_it_is_another_one():
    numbers = Numbers()
    numbers.lose(numbers.found(HERE, 0.0), HERE, 1.0)
    assert numbers.found(HERE, 3.5) == 2


def test_out_of_reach_it_is_another_one():
    numbers = Numbers(reach_px=100)
    numbers.lose(numbers.found(HERE, 0.0), HERE, 0.0)
    assert numbers.found(FAR, 0.1) == 2
    assert numbers.found(NEARBY, 0.1) == 1
