"""Where Dynamo finds what traced code reads of the step in force, and what that is called elsewhere.

The place is an attribute of a module of ours (:mod:`graphcap.cudagraph.dispatch.in_force`), which Dynamo reaches by way
of a global of the traced frame that it makes itself. So it looks like a global, and is an argument of the call.
"""

from __future__ import annotations

import re

from torch import fx

from graphcap.compiler import private
from graphcap.cudagraph.dispatch import in_force
from graphcap.cudagraph.dispatch.metadata import PREFIX

_package, _, _module = in_force.__name__.rpartition(".")
_IMPORT = rf"__import_{_package.replace('.', '_dot_')}_dot_\w+"
_WAY = re.compile(rf"G(\['{_IMPORT}'\](\.{_module}(\.is_traceable)?)?)?")
_HAS = re.compile(rf"G\['{_IMPORT}'\]\.{_module}\.{in_force.HAS}(?P<name>\w+)")
_PLACE = re.compile(rf"G\['{_IMPORT}'\]\.{_module}\.")
_INPUT = re.compile(rf"G\['(?P<global>{_IMPORT})'\](?P<way>\.{_module}\.{in_force.INPUT}(?P<name>\w+))")


def is_of_step(source: str) -> bool:
    """Whether it is found by way of the step in force."""
    return _PLACE.match(source) is not None


def inputs_read_of_step(gm: fx.GraphModule) -> frozenset[str]:
    """The inputs of a step that a Dynamo graph takes, or a part of them: ``{"step.seq_lens"}``."""
    sources = (private.source_name(node) for node in gm.graph.nodes if node.op == "placeholder")
    return frozenset(f"{PREFIX}{found['name']}" for source in sources if (found := _INPUT.match(source)) is not None)


def named_as_argument(source: str) -> str:
    """The source as if the inputs of the step were an argument called ``step``, a dict; any other is left alone."""
    return _INPUT.sub(lambda found: f"L[{PREFIX[:-1]!r}][{found['name']!r}]", source)


def leads_to_step(source: str) -> bool:
    """Whether it is on the way to what is found by way of the step in force, and a part of graphcap."""
    return _WAY.fullmatch(source) is not None


def whether_step_has(source: str) -> str:
    """The name of the input that a source asks for, ``""`` for any other source."""
    found = _HAS.fullmatch(source)
    return found["name"] if found is not None else ""


def input_name(source: str) -> str:
    """The name of the input that a source is, ``""`` for any other source."""
    found = _INPUT.fullmatch(source)
    return found["name"] if found is not None else ""


def expression(source: str) -> str:
    """What fetches the input of a step in the frame that Dynamo made code for; ``""`` for anything else."""
    found = _INPUT.fullmatch(source)
    return f"{found['global']}{found['way']}" if found is not None else ""
