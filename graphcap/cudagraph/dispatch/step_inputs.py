"""The tensors that a step brings for ops of the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from graphcap.errors import StepError, did_you_mean

if TYPE_CHECKING:
    from graphcap.cudagraph.dispatch.metadata import Serving

#: Whose buffers ops of the model find instead of the step's own inputs.
serving_now: ContextVar[Serving | None] = ContextVar("graphcap_serving", default=None)


class StepInputs(Mapping[str, Any]):
    """The tensors of a step. Inside of a call that is padded or captured they are the padded static ones.

    Attributes:
        given: the engine's own values.
        names: what a step brings, whatever it holds.
        asked: what ops have looked for, found or not, since :func:`inputs_asked_for` began.
    """

    __slots__ = ("asked", "given", "names")

    def __init__(self, given: Mapping[str, Any]) -> None:
        self.given = dict(given)
        self.names = frozenset(given)
        self.asked: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.asked.add(name)
        try:
            value = self.given[name]
        except KeyError:
            raise StepError(f"this step has no input {name!r}; {did_you_mean(name, self.given)}") from None
        serving = serving_now.get()
        return value if serving is None else serving.resolve(name, value)

    def __contains__(self, name: object) -> bool:
        self.asked.add(str(name))
        return name in self.given

    def get(self, name: str, default: Any = None) -> Any:
        """The input, or ``default`` where the step has none of this name."""
        self.asked.add(name)
        return self[name] if name in self.given else default

    def __iter__(self) -> Iterator[str]:
        self.asked |= self.names
        return iter(self.given)

    def __len__(self) -> int:
        return len(self.given)
