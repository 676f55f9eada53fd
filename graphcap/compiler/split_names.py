"""Entries of ``splitting_ops`` that cut nothing: said in the report, as a misspelled one leaves attention uncut.

No error: an entry may be about a library that is not imported yet, or about another graph of the model.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from torch import fx

from graphcap.compiler import private
from graphcap.compiler.region import Region, all_regions
from graphcap.compiler.rules import SplitRules, op_name
from graphcap.errors import nearest


def names_that_match(names: Sequence[str], graph: fx.Graph) -> frozenset[str]:
    """Those of ``splitting_ops`` that match a node of a graph."""
    targets = {node.target for node in graph.nodes if node.op in ("call_function", "call_method")}
    return frozenset(name for name in names if any(map(SplitRules((name,)).match_name, targets)))


def remarks(region: Region) -> list[str]:
    """One line for each entry that has matched nothing, in no graph that was compiled with the same entries."""
    names = region.config.splitting_ops or ()
    if not names or region.split_names is None:
        return []
    alike = [each.split_names for each in (region, *all_regions()) if each.config.splitting_ops == names]
    matched = frozenset[str]().union(*filter(None, alike))
    return [f"splitting_ops: {_remark(name)}" for name in names if name not in matched]


def _remark(name: str) -> str:
    why = why_nothing_matches(name)
    return f"{name!r} cuts nothing: {why}" if why else f"{name!r} has matched nothing in any graph so far"


def why_nothing_matches(name: str) -> str:
    """Why no graph can have what an entry names; ``""`` where it exists."""
    return _no_operator(name) if "::" in name else _no_function(name)


def _no_operator(name: str) -> str:
    registered = private.operator_names()
    namespace, _, rest = name.partition("::")
    if not any(each.startswith(f"{namespace}::") for each in registered):
        return f"no operator of the namespace {namespace!r} is registered; import the library first"
    if rest == "*" or name in registered or name.removesuffix(".default") in registered:
        return ""
    same = [each for each in registered if each.startswith(f"{namespace}::") and ("." in each) == ("." in name)]
    return f"there is no such operator{_did_you_mean(nearest(name, same) or nearest(name, registered))}"


def _no_function(name: str) -> str:
    """Looks among imported modules only: a function of another one has not been called."""
    steps = name.split(".")
    length = next((n for n in range(len(steps) - 1, 0, -1) if ".".join(steps[:n]) in sys.modules), 0)
    if not length:
        return f"there is no such function: no module {steps[0]!r} is imported"
    found: object = sys.modules[".".join(steps[:length])]
    for index, step in enumerate(steps[length:], start=length):
        if not hasattr(found, step):
            near = nearest(step, dir(found))
            return f"there is no such function{_did_you_mean(near and '.'.join([*steps[:index], near]))}"
        found = getattr(found, step)
    own = op_name(found)
    return "" if own in (name, f"aten::{steps[-1]}") else f"the function is called {own!r}"


def _did_you_mean(near: str | None) -> str:
    return f"; did you mean {near!r}?" if near else ""
