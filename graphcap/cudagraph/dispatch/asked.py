"""What ops look for among the inputs of a step: it may decide how they go on, and so what a plan is good for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from graphcap.cudagraph.dispatch.step import current, step


@dataclass(frozen=True, slots=True)
class Asked:
    """What ops looked for in the step of a call, where what they find decides how they go on.

    Attributes:
        found: per name whether it was there.
        has_step: whether there was a step at all.
    """

    found: Mapping[str, bool]
    has_step: bool

    @classmethod
    def of(cls, said: step | None, names: Iterable[str]) -> Asked:
        """``names``: what they looked for."""
        return cls({} if said is None else {name: name in said.inputs.names for name in names}, said is not None)

    def is_alike(self, said: step | None) -> bool:
        """Whether ops find the same in this step, and so go the same way."""
        names = frozenset() if said is None else said.inputs.names
        return (self.has_step or not names) and all((name in names) is there for name, there in self.found.items())


@contextlib.contextmanager
def inputs_asked_for() -> Iterator[set[str]]:
    """Gathers the names that ops look for within it among the inputs of the step in force."""
    said = current()
    if said is None:
        yield set()
        return
    before, names = said.inputs.asked, set[str]()
    said.inputs.asked = names
    try:
        yield names
    finally:
        said.inputs.asked = before
