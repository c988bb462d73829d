"""The sums of the page about few boxes, and the systems of its heads."""

import numpy as np

from calib.heads.dense_names import Answer, Names, Sureness
from calib.research.few_boxes import BOXES, conjugate_gradients, first_boxes, rendered, summed


def test_a_system_is_solved_from_the_solution_of_a_near_one():
    rng = np.random.default_rng(0)
    rows, gone = rng.normal(size=(60, 8)), rng.normal(size=(5, 8))
    near = rows.T @ rows + gone.T @ gone + np.eye(8)
    right = rng.normal(size=(8, 3))
    found = conjugate_gradients(
        lambda v: near @ v - gone.T @ (gone @ v), lambda v: np.linalg.solve(near, v), right
    )
    exact = np.linalg.solve(rows.T @ rows + np.eye(8), right)
    assert np.abs(found - exact).max() < 0.01 * np.abs(exact).max()


def test_the_first_box_counts_and_its_name():
    boxes = np.array([[0.0, 0, 10, 10], [20, 20, 40, 40]])
    sure = Sureness(Names(("old", "new"), np.ones(3, bool)), None, (1.0, 0.0), 64, 4.0)
    answers = [
        Answer(
            boxes, np.array(expected), np.zeros(2), np.eye(3)[[0, 1]], boxes[1:], np.ones(1, int)
        )
        for expected in ([0.2, 0.9], [0.9, 0.2])
    ]
    found = first_boxes(answers, sure)
    assert found == {"corloc": 0.5, "mean_iou": 0.5, "named": 1.0}


def fits(before: float, after: list[float], photos: int) -> dict[str, object]:
    def figures(corloc: float) -> dict[str, float]:
        return {"corloc": corloc, "mean_iou": corloc / 2, "named": 1.0}

    draws = [figures(each) for each in after]
    return {
        "photos": photos,
        "before": figures(before),
        "after": {str(count): draws for count in BOXES},
    }


def test_classes_are_weighed_by_their_photos_and_the_worst_draw_is_told():
    few, many = fits(0.0, [0, 0, 0, 0, 1], 10), fits(0.8, [0.8, 0.9, 0.7, 0.8, 0.8], 30)
    found = summed({"few": few, "many": many})
    assert found["photos"] == 40
    assert found["before"] == 60
    assert np.isclose(found[10]["median"], 60)
    assert np.isclose(found[10]["worst"], 52.5)
    assert np.isclose(found[10]["best"], 85)
    page = rendered(
        {
            "car": many,
            "lamp": few,
            **dict.fromkeys(("boat", "cat"), many),
            **dict.fromkeys(("cow", "dog", "person"), many),
        },
        {"raccoon": few},
    )
    assert "| car * | 30 | 80.0 | 80.0 (70.0) |" in page
    assert "| lamp | 10 | 0.0 | 0.0 (0.0) |" in page
