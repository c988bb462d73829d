"""Reverse-mode differentiation of an ONNX graph, written as ONNX.

``walk`` goes back through the graph once; ``RULES`` has one rule for each operator. Each rule gets
the cotangent of a node's output (the gradient of the objective with respect to it) and appends the
nodes that compute the cotangent of one of its inputs. Weights are constants and get none. The
formulas are those of Griewank & Walther (2008, chapter 3), in the forms that OpenVINO and TensorRT
compile well: no ConvTranspose, no scatter.
"""

from engines.gradient import elementwise, linear, reductions, shapes
from engines.gradient.walk import RULES, Rule, Step, attach_gradient

for part in (elementwise, linear, reductions, shapes):
    RULES.update(part.RULES)

__all__ = ["RULES", "Rule", "Step", "attach_gradient"]
