"""What is asked of a trace: one graph or graphs with breaks between, and what it is told about the declared sizes.

A trace, the first and every later one, insists on one graph. With sizes unknown to the trace ("unbacked"), ``if
x.shape[0] > 4`` would otherwise break the graph in silence; so a target falls back to ordinary dynamic dims
("dynamic"), which specialise sizes 0 and 1 and guard on the branch. Where the graph breaks with these too, it is not
for the sizes: they stay unknown, and breaks are allowed from then on.
"""

from __future__ import annotations

from graphcap.compiler.frontend import dynamo
from graphcap.compiler.frontend.marked_call import DYNAMIC, UNBACKED


def next_attempt(must_be_whole: bool, marking: str, error: Exception, *, has_dims: bool) -> tuple[bool, str] | None:
    """What to ask after a trace has failed.

    Args:
        must_be_whole: whether one graph was asked for.
        marking: how the dims were marked, ``"unbacked"`` or ``"dynamic"``.
        error: what the trace ended in.
        has_dims: whether any dims are declared or inferred.

    Returns:
        The first two of these for the next trace; ``None`` where asking for less does not help.
    """
    if must_be_whole and dynamo.is_graph_break(error):
        # Dynamo has many ways to stumble over an unknown size. Where it breaks with known sizes too, it is none.
        return (True, DYNAMIC) if marking == UNBACKED else (False, UNBACKED)
    return (False, DYNAMIC) if marking == UNBACKED and has_dims else None
