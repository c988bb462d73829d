"""What is differentiated: the objectives, each as its gradient at the place where the walk back
begins.
"""

import numpy as np

from engines.graph import Graph, attributes_of
from engines.networks.network import Forward

OBJECTIVES = ("class", "gestalt", "probability")


def objective_cotangents(
    graph: Graph, forward: Forward, class_index: str, objective: str
) -> dict[str, str]:
    """A tensor, and the gradient of the objective (see ``OBJECTIVES``) with respect to it.

    Args:
        graph: appended to.
        forward: the forward graph's landmarks.
        class_index: int64 ``[N]``; unused by ``gestalt``.
        objective: which.
    """
    if objective == "gestalt":
        return {forward.last: gestalt_cotangent(graph, forward.last)}
    if objective == "probability":
        return _probability_cotangent(graph, forward, class_index)
    return class_score_cotangent(graph, forward.scores, class_index)


def _probability_cotangent(graph: Graph, forward: Forward, class_index: str) -> dict[str, str]:
    """Of softmax, p_c (e_c - p); of a sigmoid for each class, p_c (1 - p_c) e_c.

    It is how much the probability of class c moves with each score (Ebrahimpour & Noelle, "Fast
    Object Localization via Sensitivity Analysis", equation 2 at an output unit).
    """
    hint = "probabilities"
    if forward.independent:
        probabilities = graph.add("Sigmoid", forward.scores, hint=hint)
    else:
        probabilities = graph.add("Softmax", forward.scores, axis=1, hint=hint)
    depth = graph.constant(graph.shape(forward.scores)[1], np.int64)
    values = graph.constant([0.0, 1.0])
    chosen = graph.add("OneHot", class_index, depth, values, axis=1, hint="one_hot")
    picked = graph.add("Mul", probabilities, chosen, hint="chosen_probability")
    one = graph.constant([1], np.int64)
    probability = graph.add("ReduceSum", picked, one, keepdims=1, hint="probability_of_chosen")
    own = probabilities if not forward.independent else picked
    rest = graph.add("Sub", chosen, own, hint="probability_slope")
    return {forward.scores: graph.add("Mul", probability, rest, hint="probability_cotangent")}


def class_score_cotangent(graph: Graph, scores: str, class_index: str) -> dict[str, str]:
    """A tensor, and the gradient with respect to it of the score of class ``class_index`` (int64
    ``[N]``).

    Where the scores (``[N, classes]``) are a linear layer's, that is a row of its weight for its
    input, and no product at all.
    """
    last = graph.producer(scores)
    if last is not None and last.op_type == "Gemm" and last.input[1] in graph.constants:
        at = attributes_of(last)
        if at.get("transB", 0) and at.get("alpha", 1.0) == 1 and not at.get("transA", 0):
            return {
                last.input[0]: graph.add(
                    "Gather", last.input[1], class_index, axis=0, hint="class_weights"
                )
            }
    depth = graph.constant(graph.shape(scores)[1], np.int64)
    values = graph.constant([0.0, 1.0])
    return {scores: graph.add("OneHot", class_index, depth, values, axis=1, hint="one_hot")}


def gestalt_cotangent(graph: Graph, activations: str) -> str:
    """Gradient of the Gestalt Total, the mean of the last feature maps, with respect to those maps.

    ``GT = mean(A_last)`` (Ebrahimpour & Noelle, "Fast Object Localization via Sensitivity
    Analysis", section 2, equation 3), per image.
    """
    shape = graph.shape(activations)
    return graph.constant(np.full(shape, 1.0 / np.prod(shape[1:])), hint="gestalt_cotangent")
