"""The tensors that a step brings for the model and its ops."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch

from graphcap.cudagraph.dispatch.in_force import serving_now
from graphcap.cudagraph.dispatch.key import check_type
from graphcap.errors import StepError, did_you_mean


class StepInputs(Mapping[str, Any]):
    """The tensors of a step. Inside of a call that is padded or captured, ops find the padded static ones.

    (For the traced code of the model they are inputs of its graph: see ``current_step.py``.)

    Attributes:
        given: the engine's own values.
        names: what a step brings, whatever it holds.
        asked: what ops have looked for, found or not, since :func:`inputs_asked_for` began; ``None`` outside of it.
    """

    __slots__ = ("_twins", "asked", "given", "names")

    def __init__(self, given: Mapping[str, Any]) -> None:
        if type(given) is not dict:  # as good as always; the check itself takes longer than the rest
            check_type("inputs", given, Mapping, "a dict of tensors by the names that the model reads them by")
        self.given = dict(given)
        self.names = frozenset(given)
        self.asked: set[str] | None = None
        self._twins: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __getitem__(self, name: str) -> Any:
        if self.asked is not None:
            self.asked.add(name)
        try:
            value = self.given[name]
        except KeyError:
            raise StepError(f"this step has no input {name!r}; {did_you_mean(name, self.given)}") from None
        serving = serving_now.get()
        return value if serving is None else serving.resolve(name, value)

    def __contains__(self, name: object) -> bool:
        if self.asked is not None:
            self.asked.add(str(name))
        return name in self.given

    def get(self, name: str, default: Any = None) -> Any:
        """The input, or ``default`` where the step has none of this name."""
        if name not in self:
            return default
        return self[name]

    def __iter__(self) -> Iterator[str]:
        if self.asked is not None:
            self.asked |= self.names
        return iter(self.given)

    def __len__(self) -> int:
        return len(self.given)

    def for_a_trace(self, name: str) -> Any:
        """The input as traced code finds it: the same values, each tensor as an object that is nothing else in a call,
        also in dicts, lists, tuples and dataclasses.

        A trace takes an object that it finds twice for one input, and guards on that. But where one of the places is a
        local variable and the other is not, as an argument and this, it leaves that guard out, and would take them for
        one in later calls as well.
        """
        return self._own(self.given[name])

    def end(self) -> None:
        """The step is over: a later one with the same inputs may find other memory in them."""
        self._twins.clear()

    def _own(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            if value.requires_grad and torch.is_grad_enabled():
                return value  # nothing is captured then, and its gradient is wanted
            known = self._twins.get(id(value))
            if known is None:
                known = self._twins[id(value)] = value, value.detach()
                if marks := vars(value):
                    vars(known[1]).update(marks)
            return known[1]
        if type(value) is dict:
            return {key: self._own(each) for key, each in value.items()}
        if type(value) in (list, tuple):
            return type(value)(map(self._own, value))
        if hasattr(value, "_fields") and isinstance(value, tuple):
            return type(value)(*map(self._own, value))
        if is_dataclass(value) and not isinstance(value, type):
            twin = copy.copy(value)
            for field in fields(value):
                object.__setattr__(twin, field.name, self._own(getattr(value, field.name)))
            return twin
        return value
