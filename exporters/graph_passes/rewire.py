"""The one step that passes share: a tensor takes another's place."""

from __future__ import annotations

from typing import Any

__all__ = ["bypass", "constant_of"]


def bypass(model: Any, node: Any, source: Any) -> bool:  # Any: onnx_ir types, of an optional dependency
    """Let ``source`` take the place of the only output of ``node``, and remove the node.

    Returns:
        False, with nothing changed, when the output is one of the graph's and ``source`` cannot take its name.
    """
    (output,) = node.outputs
    if output.is_graph_output():
        return False
    output.replace_all_uses_with(source)
    model.graph.remove(node, safe=True)
    return True


def constant_of(value: Any) -> Any | None:
    """The NumPy array of an initializer, None for everything else."""
    if value is None or value.const_value is None or not value.is_initializer():
        return None
    return value.const_value.numpy()
