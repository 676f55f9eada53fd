"""The functions for a graph with ``guards="full"`` where the state of modules is watched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from graphcap import native
from graphcap.compiler.frontend.frame_function import FrameWriter
from graphcap.compiler.frontend.guards import Guards, asked_of_step
from graphcap.compiler.frontend.same_call import CallBody, StaticPaths
from graphcap.compiler.frontend.watched_state import WatchedState, left_out
from graphcap.cudagraph.dispatch.in_force import inputs_found


@dataclass(frozen=True, slots=True)
class WatchedFunction:
    """Two generated functions and what they go by.

    Attributes:
        function: takes what the frame takes, evaluates all guards, and returns what the frame returns, or ``MISS``.
        again: the same for calls that look like one that ``function`` has served, while nothing is written to modules
            and globals: evaluates the guards on anything else.
        state: of these.
    """

    function: Callable[..., Any]
    again: Callable[..., Any]
    state: WatchedState

    def others_evaluated(self) -> None:
        """Dynamo may have evaluated the guards since, under other circumstances."""
        self.state.others.others_evaluated()


def watched_function(writer: FrameWriter, guards: Guards) -> WatchedFunction | None:
    """Write the functions for one graph.

    Args:
        writer: of the frame.
        guards: all guards of the graph.

    Returns:
        ``None`` where they would be no better than one that evaluates all guards: nobody tells of writes, there is no
        module that the frame begins with, or guards see more of arguments than their layout.
    """
    if not native.tells_of_writes():
        return None
    roots = {name: bound for name, bound in writer.bound.items() if isinstance(bound, nn.Module)}
    nodes = guards.nodes({*roots, *writer.cells}) if roots else []
    places = left_out(nodes, roots, writer.entry.__globals__)
    if places is None:
        return None
    proved, of_arguments = places
    paths = StaticPaths(writer, {("parameter", name): module for name, module in roots.items()})
    others = guards.without(proved | of_arguments, nodes)
    f_globals, num_arguments = writer.entry.__globals__, len(writer.frame.arguments)
    state = WatchedState(nodes, roots, f_globals, proved, others, paths.inputs(), num_arguments)
    unaliased = [text for node in nodes if (text := node.argument())]
    body, layout = CallBody(writer, paths, unaliased, asked_of_step(nodes)), guards.same_layout()
    prefix, modules = writer.frame.prefix, ", ".join(roots)
    learn = f"if {body.no_more} and {prefix}state.learn({modules}): {prefix}layout.learn({body.values})"
    function = writer.function(guards, [learn], {"state": state, "layout": layout, "of_step": inputs_found})
    known = f"{prefix}state.known({writer.variables()}, {body.ids}, {modules})"
    return WatchedFunction(function, body.again(layout, known, {"state": state}), state)
