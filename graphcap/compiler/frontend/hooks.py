"""Notices hooks that were registered after a trace, which Dynamo's guards do not.

By default (``torch._dynamo.config.skip_nnmodule_hook_guards``) Dynamo guards the hooks of a module only where there are
some: what was traced without a hook goes on without it. To guard the empty dicts too costs 1.8 us a call on torch 2.11
and 80 us on 2.13 (226 parameters). But every registration takes a number from one counter, and a look at that is free.
A target that turns out to get hooks late is traced again, with these guards (``dynamo.hook_guards``); the hooks of all
modules (``register_module_forward_hook``) have none even then.

Not noticed: a hook that was written into a module's dict by hand, and a submodule that had its hooks before it took the
place of another.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from types import FunctionType
from typing import Any

import torch.nn.modules.module as module_hooks
from torch import nn
from torch.utils.hooks import RemovableHandle

_OF_A_MODULE = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_OF_ALL = tuple(f"_global{name}" for name in _OF_A_MODULE)


class HookWatch:
    """The hooks that one compiled function may meet.

    Attributes:
        counter: ``RemovableHandle.next_id`` at the last look; as long as it is the same there is no new hook.
    """

    def __init__(self, roots: Callable[[], Iterable[nn.Module]]) -> None:
        """Look at nothing yet.

        Args:
            roots: the modules that the function runs; their submodules are found.
        """
        self._roots = roots
        self.counter = -1
        #: Where every trace so far has met hooks, and guards them.
        self._guarded: frozenset[tuple[int, str]] | None = None

    def traced(self) -> None:
        """The function has been traced with the hooks that there are now."""
        met = frozenset(self._occupied())
        self._guarded = met if self._guarded is None else self._guarded & met

    def has_unguarded(self) -> bool:
        """Whether a hook was registered since the last time where a trace has met none."""
        if RemovableHandle.next_id == self.counter:
            return False
        # The counter is read first: what is registered while the modules are looked at is found the next time.
        self.counter = RemovableHandle.next_id
        return self._guarded is not None and not self._guarded.issuperset(self._occupied())

    def _occupied(self) -> Iterator[tuple[int, str]]:
        for name in _OF_ALL:
            if getattr(module_hooks, name, None):
                yield 0, name
        for root in self._roots():
            for module in root.modules():
                for name in _OF_A_MODULE:
                    if getattr(module, name, None):
                        yield id(module), name


def tables_of(modules: Iterable[nn.Module]) -> list[tuple[int, dict[int, Any]]]:
    """Every dict in which there are hooks that a call of these modules meets, but for those of submodules: the ``id``
    of the module (0 for hooks of all modules), and the hooks by number."""
    places = [(0, getattr(module_hooks, name, None)) for name in _OF_ALL]
    places += [(id(module), getattr(module, name, None)) for module in modules for name in _OF_A_MODULE]
    return [(owner, hooks) for owner, hooks in places if hooks]


def modules_of(original: Any) -> Iterator[nn.Module]:
    """The modules that a module, bound method or function is seen to run: itself, its object, what its code names."""
    owner = getattr(original, "__self__", original)
    if isinstance(owner, nn.Module):
        yield owner
    function = getattr(original, "__func__", original)
    if isinstance(function, FunctionType):
        used = inspect.getclosurevars(function)
        yield from (
            value for value in (*used.nonlocals.values(), *used.globals.values()) if isinstance(value, nn.Module)
        )
