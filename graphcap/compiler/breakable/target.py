"""One target that is captured without Dynamo: ``graphcap.compile(..., frontend="breakable")``.

A call is flattened to its key, of which declared sizes are no part; every key has entries of its own, one per state of
the modules (``training``, which submodules there are). What an entry does not fit is recorded anew.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import logging
import re
import threading
import weakref
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from types import FunctionType, MethodType
from typing import Any

from torch import nn

from graphcap.compiler import private
from graphcap.compiler.breakable import current
from graphcap.compiler.breakable.entry import Entry
from graphcap.compiler.breakable.incoming import Incoming
from graphcap.compiler.breakable.key import Arguments, arguments_of
from graphcap.compiler.breakable.look import Viewpoint
from graphcap.compiler.breakable.sizes import CallSizes, sizes_of
from graphcap.compiler.frontend.call_dims import CallDims
from graphcap.compiler.frontend.target import CompiledTarget
from graphcap.compiler.region import Region, close_region, register
from graphcap.cudagraph.dispatch.metadata import PREFIX
from graphcap.cudagraph.dispatch.step import current as current_step

log = logging.getLogger("graphcap.compiler")

MAX_STATES = 8  #: Python states that one key is recorded in
MAX_GIVEN_UP = 4096  #: keys; with more of them a target records nothing new

_numbers = itertools.count()
_targets: weakref.WeakSet[BreakableTarget] = weakref.WeakSet()


class BreakableTarget(CompiledTarget):
    """What was asked for one module, function or method. Dynamo is never called."""

    def __init__(
        self,
        original: Callable[..., Any],
        entry: FunctionType,
        *,
        name: str,
        kind: str,
        dims: CallDims,
        options: Mapping[str, Any],
        fullgraph: bool = False,
    ) -> None:
        super().__init__(original, entry, name=name, kind=kind, dims=dims, options=options, fullgraph=fullgraph)
        self._entries: dict[Hashable, list[Entry]] = {}
        self._given_up: set[Hashable] = set()
        self._watched: dict[int, weakref.ref[Any]] = {}
        self._forgotten: list[Region] = []  # what reports still know though it serves no call any more
        self._lock = threading.RLock()
        self._step_names: frozenset[str] = frozenset()
        self._largest = {dim.name: dim.max for dim in (*dims.dims, *dims.step_dims) if dim.max is not None}
        self._exact = self._why_exact()
        _targets.add(self)
        self._signature = inspect.signature(original.forward if isinstance(original, nn.Module) else original)

    def call(self, bound: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the target, through a plan where there is one.

        Raises:
            DimError: the call does not have the declared dims.
            GuardError: the function does something else than when it was recorded.
        """

        if current.recording() is not None or private.operators_are_watched():
            # Part of what is being recorded, or of what somebody else does with it.
            return self.entry(*bound, *args, **kwargs)
        if self._forgotten:
            self._close_forgotten()
        self._check(args, kwargs)
        call = self._incoming(bound, args, kwargs)
        key = call.arguments.key
        for entry in self._entries.get(key, ()):
            if entry.fits(call):
                return entry.call(call)
        if key in self._given_up or len(self._given_up) > MAX_GIVEN_UP:
            return call.run()
        with self._lock:
            new = self._new_entry(call.arguments)
            return call.run() if new is None else new.call(call)

    def forget(self) -> None:
        """Record everything anew from the next call on."""
        self._entries.clear()
        self._given_up.clear()

    def _incoming(self, bound: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Incoming:
        said, names = current_step(), self._step_names
        inputs = {}
        if names and said is not None:
            inputs = {name: value for name, value in said.inputs.given.items() if name in names}
        sizes = sizes_of(self.dims, args, kwargs, inputs) if not self._exact else CallSizes()
        arguments = arguments_of(args, kwargs, inputs, sizes)

        def function(*args: Any, **kwargs: Any) -> Any:
            return self.entry(*bound, *args, **kwargs)

        def leaf_names() -> list[str]:
            return [*self._names(args, kwargs), *(f"{PREFIX}{name}" for name in inputs)]

        return Incoming(function, args, kwargs, arguments, names, leaf_names)

    def _read_from_step(self, names: set[str]) -> None:
        """These inputs of the step are read: they are arguments like others from now on."""
        self._step_names |= names
        _close(entry for entries in self._entries.values() for entry in entries)
        self.forget()

    def _new_entry(self, arguments: Arguments) -> Entry | None:
        """An entry for these arguments in the present Python state, ``None`` where there are too many."""
        self._drop_what_is_over()
        known = self._entries.setdefault(arguments.key, [])
        total = sum(map(len, self._entries.values()))
        if len(known) >= MAX_STATES or total >= self.config.max_plans + MAX_STATES:
            self._given_up.add(arguments.key)
            if known and known[-1].unsettled and not known[-1].refused:
                known[-1].refuse(known[-1].unsettled)
            self._note_once(
                f"{total} recordings, {len(known)} of one call in different states: further ones run eager. What "
                "changes from call to call should be a tensor"
            )
            return None
        viewpoint = Viewpoint(self._roots_of(arguments), len(self._own_roots()), _asker(weakref.ref(self)))
        entry = Entry(self._region(arguments), viewpoint, self._largest)
        if why := arguments.reason_to_refuse():
            entry.refuse(why)
        for leaf in arguments.opaque() if not why else ():
            self._forget_with(leaf, arguments.key)
        known.append(entry)
        if self._exact:
            self._note_once(self._exact)
        return entry

    def _drop_what_is_over(self) -> None:
        """Recordings keep what a module has, even if the module is gone."""
        for key, entries in list(self._entries.items()):
            if over := [entry for entry in entries if entry.is_over]:
                # Another thread may be going through the list.
                self._entries[key] = [entry for entry in entries if entry not in over]
                _close(over)

    def _why_exact(self) -> str:
        """Why sizes are not padded, ``""`` where they are."""
        if self.dims.inferred or not (self.dims.dims or self.dims.step_dims):
            return "each size has a recording of its own: declare dynamic_arg_dims to pad"
        if self.config.process_group is not None:
            return "each size has a recording of its own: what is recorded at padded sizes is not agreed between ranks"
        return ""

    def _region(self, arguments: Arguments) -> Region:
        number, code = next(_numbers), self.entry.__code__
        original = self.original
        return register(
            Region(
                name=f"{self.name.rpartition('.')[0].rpartition('.')[2] or self.name}_breakable_{number}",
                function=self.name,
                location=f"{code.co_filename}:{code.co_firstlineno}",
                compile_id="recorded without Dynamo",
                config=self.config,
                code=code,
                key_sizes=self._places(arguments),
                _owner=weakref.ref(original) if isinstance(original, nn.Module) else lambda: None,
            )
        )

    def _places(self, arguments: Arguments) -> dict[str, str]:
        """Per symbol where it was declared first."""
        places: dict[str, str] = {}
        for dim in (*self.dims.dims, *self.dims.step_dims):
            places.setdefault(dim.follows[0] if dim.follows else dim.name, f"{dim.path} dim {dim.dim}")
        return {symbol: places[symbol] for symbol in arguments.sizes.values}

    def _own_roots(self) -> list[Any]:
        original = self.original
        if isinstance(original, nn.Module):
            return [original, type(original).forward]
        if isinstance(original, MethodType):
            return [original.__self__, original.__func__]
        return [original]

    def _roots_of(self, arguments: Arguments) -> Callable[[], Sequence[Any]]:
        """Where Python state is reached from, without keeping it alive."""
        itself = weakref.ref(self)
        objects = [weakref.ref(leaf) for leaf in arguments.opaque()] if not arguments.reason_to_refuse() else []

        def roots() -> Sequence[Any]:
            target = itself()
            return [*(target._own_roots() if target is not None else ()), *(each() for each in objects)]

        return roots

    def _forget_with(self, leaf: Any, key: Hashable) -> None:
        """Drop the recordings of a key when an object dies that is part of it: another may get its identity."""
        itself = weakref.ref(self)

        def forget(_: Any) -> None:
            target = itself()
            if target is not None:
                # An object may die in the midst of anything, where no lock can be taken: reports hear of it later.
                target._forgotten += [entry.region for entry in target._entries.pop(key, ())]
                target._given_up.discard(key)
                target._watched.pop(number, None)

        number = next(_numbers)
        self._watched[number] = weakref.ref(leaf, forget)

    def _close_forgotten(self) -> None:
        with contextlib.suppress(IndexError):  # another thread may do the same
            while True:
                close_region(self._forgotten.pop())

    def _names(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
        """What a user would call each leaf of the arguments."""
        parameters = [p for p in self._signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        names = []
        for text in private.tree_leaf_names((args, kwargs)):
            which, first, rest = re.match(r"\[(\d)\]\[([^\]]*)\](.*)", text, re.DOTALL).groups()  # type: ignore[union-attr]
            if which == "0":
                at = int(first)
                plain = at < len(parameters) and all(p.kind is not p.VAR_POSITIONAL for p in parameters[: at + 1])
                first = parameters[at].name if plain else f"args.{at}"
            names.append(re.sub(r"[\[\]'.]+", ".", f"{first.strip(chr(39))}{rest}").strip("."))
        return names

    def _note_once(self, note: str) -> None:
        kind = note.partition(": ")[2]
        if not any(kind in each for each in self.notes):
            self._note(note)


def forget_recordings() -> None:
    """Have all targets of the process record everything anew; their regions are the caller's to forget."""
    for target in list(_targets):
        target.forget()


def _asker(target: weakref.ref[BreakableTarget]) -> Callable[[set[str]], None]:
    def ask(names: set[str]) -> None:
        if (found := target()) is not None:
            found._read_from_step(names)

    return ask


def _close(entries: Iterable[Entry]) -> None:
    """Let reports forget what serves no call any more."""
    for entry in entries:
        close_region(entry.region)
