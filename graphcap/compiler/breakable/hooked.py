"""Whether modules have the hooks that they had: a recording lacks what came later, and runs what is gone."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

from torch import nn
from torch.utils.hooks import RemovableHandle

from graphcap.compiler.frontend.hooks import tables_of


class Hooks:
    """The hooks of some modules, and those of all modules.

    A registration takes a number from a counter, a removal makes a dict smaller: as long as neither happens nobody
    looks at the modules.

    Attributes:
        numbers: of each hook, with the ``id`` of its module.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        """Remember the hooks that there are now; the modules are not kept alive."""
        self._modules = [weakref.ref(module) for module in modules]
        self._look()
        self.numbers = self._found

    def hold(self) -> bool:
        """Whether there are the same ones."""
        if RemovableHandle.next_id != self._counter or any(len(hooks) != size for hooks, size in self._tables):
            self._look()
        return self._found == self.numbers

    @property
    def are_lost(self) -> bool:
        """Whether one was gone at the last look: its number never comes back."""
        return not self.numbers <= self._found

    def _look(self) -> None:
        counter = RemovableHandle.next_id  # first: what is registered during the look is found the next time
        tables = tables_of(module for each in self._modules if (module := each()) is not None)
        self._found = frozenset((owner, number) for owner, hooks in tables for number in list(hooks))
        self._tables = [(hooks, len(hooks)) for _, hooks in tables]
        self._counter = counter
