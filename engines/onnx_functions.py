"""Functions that an ONNX file defines for itself, put in place of their calls."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx
import onnx.inliner

from engines.base import ModelError
from engines.reading import shown

MOST_NODES = 20_000
"""Operators of a network; the largest published ones have half as many."""
DEEPEST = 40
Key = tuple[str, str, str]


def inlined(path: Path, model: onnx.ModelProto) -> onnx.ModelProto:
    """The same network without functions; how long it gets is known before it is written out.

    Raises:
        ModelError: functions call themselves, or stand for too many operators.
    """
    if not model.functions:
        return model
    functions = {(f.domain, f.name, f.overload): f for f in model.functions}
    if len(functions) != len(model.functions):
        raise ModelError(f"{path} defines a function twice: the file is damaged")
    _expanded(path, model.graph.node, functions, {}, ())
    weights = list(model.graph.initializer)  # the inliner need not copy them
    del model.graph.initializer[:]
    versions = {each.version for each in model.opset_import if each.domain in ("", "ai.onnx")}
    theirs = {o.version for f in model.functions for o in f.opset_import if o.domain in ("", "ai.onnx")}
    try:
        flat = onnx.inliner.inline_local_functions(model, convert_version=bool(theirs - versions))
    except Exception as error:  # native code, with exceptions of its own
        text = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"{path}: its local functions cannot be inlined: {shown(text)}") from error
    flat.graph.initializer.extend(weights)
    if flat.functions or any(node.domain not in ("", "ai.onnx") for node in flat.graph.node):
        raise ModelError(f"{path}: not all of its local functions can be inlined: export it without functions")
    return flat


def _expanded(
    path: Path, nodes: Sequence[onnx.NodeProto], functions: Mapping[Key, onnx.FunctionProto],
    known: dict[Key, int], callers: tuple[Key, ...],
) -> int:  # fmt: skip
    """How many operators these nodes stand for."""
    total = 0
    for node in nodes:
        key = (node.domain, node.op_type, node.overload)
        if key not in functions:
            total += 1
            continue
        if key in callers or len(callers) > DEEPEST:
            raise ModelError(f"{path}: function {shown(node.op_type)} calls itself, or is nested too deeply")
        if key not in known:
            known[key] = _expanded(path, functions[key].node, functions, known, (*callers, key))
        total += known[key]
    if total > MOST_NODES:
        raise ModelError(f"{path} stands for more than {MOST_NODES:,} operators with its functions written out")
    return total
