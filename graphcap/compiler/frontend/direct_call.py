"""Calls around Dynamo's frame hook, with its guards.

``torch.compile`` finds the graph for a call in a hook that runs when the frame of the compiled function is evaluated.
The guards themselves are cheap; the hook, the wrappers around it, and the code that fetches hundreds of parameters for
the graph are not. A target that calls the same function again and again can do without: for each graph that Dynamo has
made of it, :class:`DirectCalls` has a generated function that

1. evaluates the guards (all of them, on every call, with the variables that the frame would have had),
2. does what Dynamo's code for the frame does, line by line (:mod:`graphcap.compiler.frontend.frame_reader`), side
   effects included, except that parameters, buffers and module attributes are proved to be those of the last call where
   that is cheaper than fetching them (:mod:`graphcap.compiler.frontend.statics`).

Whatever is not understood, and every call for which no guards hold, goes through Dynamo, which decides, traces and
recompiles. Nothing here keeps a graph alive: a generated function asks Dynamo for its guards and the globals of the
frame for the graph, and steps aside when they are gone.

With ``guards="sealed"`` the first step evaluates only the guards on arguments, and ``seal.py`` says when the others.
With ``guards="full"`` those on modules are not evaluated where Python tells that nobody has written to these
(``watched_state.py``). A call that looks exactly like an earlier one goes without those on arguments as well
(``same_layout.py``).

Microseconds per call of a decoder with 226 parameters in 340 modules and a graph that does nothing (medians of 150
batches of 60 calls, one core of a two-core virtual machine):

=================================================  ========================  ========================
..                                                 torch 2.11, Python 3.12   torch 2.13, Python 3.11
=================================================  ========================  ========================
``nn.Module.compile()``                                                  31                       102
``graphcap.compile``                                                    9.6                        82
``graphcap.compile(guards="sealed")``                                   9.1                        32
=================================================  ========================  ========================

On 2.11 all guards take 4.2 of it, those on arguments 2.1. On 2.13 nearly all of the time is guards, and when sealed the
look at what modules hold: Python 3.12 and later tell of writes to dicts, so that it takes 0.1 there and 19 on 3.11.
(The proof is the C++ one; without it inputs are fetched. The figures are older than ``same_layout.py``.) From 2.12 on
torch no longer skips module trees whose dicts are unchanged (``use_recursive_dict_tags_for_guards``), because the skip
has crashed; it is not turned on here either.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any

from graphcap import native
from graphcap.compiler.frontend import dynamo, plain_call
from graphcap.compiler.frontend.frame_code import Unreadable
from graphcap.compiler.frontend.frame_function import MISS, FrameWriter
from graphcap.compiler.frontend.frame_reader import read
from graphcap.compiler.frontend.guards import Guards
from graphcap.compiler.frontend.sealed_function import SealedFunction, sealed_function
from graphcap.compiler.frontend.watched_function import WatchedFunction, watched_function

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Way:
    """The function for one graph; ``None`` where Dynamo serves it. And what else there is for it."""

    guards: Guards
    function: Callable[..., Any] | None
    quick: SealedFunction | WatchedFunction | None = None


class DirectCalls:
    """The direct ways to the graphs of one function.

    Attributes:
        again: the functions for calls that look exactly like an earlier one.
        count: calls that took one.
        refused: why there is none to a graph, one line for each reason.
    """

    def __init__(self, entry: FunctionType, *, sealed: bool = False) -> None:
        """Know no graph yet.

        Args:
            entry: what Dynamo compiles.
            sealed: evaluate the guards on Python state only where :mod:`graphcap.compiler.frontend.seal` says so.
        """
        self.count = 0
        self.refused: list[str] = []
        self._entry = entry
        self._sealed = sealed
        self._is_plain: Callable[[], bool] = lambda: False
        self._ways: tuple[_Way, ...] = ()
        self._functions: tuple[Callable[..., Any], ...] = ()
        self.again: tuple[Callable[..., Any], ...] = ()

    def __call__(self, bound: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of a call, or :data:`MISS` when nothing has run.

        Raises:
            GuardError: sealed, and what the graph relies on has changed.
        """
        if not self._functions or not self._is_plain():
            return self._not_served()
        result = self.first_of(self._functions, bound, args, kwargs)
        return self._not_served() if result is MISS else result

    def first_of(
        self,
        functions: tuple[Callable[..., Any], ...],
        bound: tuple[Any, ...],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """The result of the first of these functions that serves a call, or :data:`MISS`.

        Raises:
            GuardError: as above.
        """
        try:
            for function in functions:
                result = function(*bound, *args, **kwargs)
                if result is not MISS:
                    self.count += 1
                    return result
        except BaseException:
            dynamo.leave_functorch_layers()
            raise
        return MISS

    def _not_served(self) -> Any:
        for way in self._ways:
            if way.quick is not None:
                way.quick.others_evaluated()
        return MISS

    def learn(self, bound: tuple[Any, ...]) -> list[str]:
        """Take over what Dynamo has compiled since, and forget what it has dropped.

        Args:
            bound: the object that the function takes before the caller's arguments, if any.

        Returns:
            New reasons in ``refused``.
        """
        num_refused = len(self.refused)
        known = [way for way in self._ways if not way.guards.are_dropped]
        ways = []
        for manager, code in dynamo.compiled_frames(self._entry.__code__):
            found = next((way for way in known if way.guards.belong_to(manager)), None)
            ways.append(found or self._way(Guards(manager), code, bound))
        self._ways = tuple(ways)
        self._functions = tuple(way.function for way in ways if way.function is not None)
        quick = [way.quick for way in ways if way.quick is not None]
        self.again = tuple(each.again for each in quick if each.again is not None)
        if self._functions:
            try:
                self._ask_plainly()
                native.when_ready(self, DirectCalls._ask_plainly)
            except (AttributeError, ImportError) as error:
                self._functions = self.again = ()
                self._refuse(f"this torch does not tell whether a call comes from plain Python: {error}")
        return self.refused[num_refused:]

    def _refuse(self, reason: str) -> None:
        if reason not in self.refused:
            self.refused.append(reason)

    def _ask_plainly(self) -> None:
        self._is_plain = plain_call.plain_caller()

    def unchecked_guards(self) -> list[str]:
        """The guards that calls go by without, each once: those of graphs that are sealed now. Values come first."""
        sealed = [way.quick for way in self._ways if isinstance(way.quick, SealedFunction)]
        found = dict.fromkeys(guard for each in sealed if each.seal.is_closed for guard in each.on_arguments.unchecked)
        return sorted(found, key=lambda guard: not guard.startswith(("L[", "G[")))

    def _way(self, guards: Guards, code: CodeType, bound: tuple[Any, ...]) -> _Way:
        try:
            writer = FrameWriter(read(code), self._entry, bound)
            function = writer.function(guards)
            quick: SealedFunction | WatchedFunction | None
            quick = sealed_function(writer, guards, function) if self._sealed else watched_function(writer, guards)
            return _Way(guards, function if quick is None else quick.function, quick)
        except Unreadable as unreadable:
            reason = str(unreadable)
        except Exception as error:  # a fault of ours: Dynamo goes on serving
            log.warning("%s: no direct calls: %s", self._entry.__qualname__, error, exc_info=True)
            reason = f"{type(error).__name__}: {error}"
        self._refuse(reason)
        return _Way(guards, None)
