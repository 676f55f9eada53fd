"""One call, watched: every operator that runs, in order, with the values that it reads, makes and writes.

Two modes are on while the function runs. The dispatch mode sees operators below autograd and autocast, so what is
written down is what really ran. The function mode sees the few ways in which a value leaves for Python, or its address
for a kernel, without any operator. The function runs for real and its results are its own: a recording only watches,
and one that has met something that it cannot repeat says so and watches no further.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from graphcap.compiler import nodes, private
from graphcap.compiler.breakable import current
from graphcap.compiler.breakable.calls import Call, Kind, Outcome, Ref, Value
from graphcap.compiler.breakable.generators import generator_states
from graphcap.compiler.breakable.inside import Inside, asked_apart
from graphcap.compiler.breakable.key import layout_of
from graphcap.compiler.breakable.limits import WAYS_OUT, reads_values, why_live
from graphcap.compiler.breakable.numbering import Numbering, identity
from graphcap.compiler.breakable.origin import here
from graphcap.compiler.breakable.unwritten import Unwritten
from graphcap.compiler.effects import declared_written
from graphcap.compiler.rules import op_name

log = logging.getLogger("graphcap.compiler")

#: Give back what they were given; nothing to do in a replay.
_TRANSPARENT = {"aten::lift_fresh", "aten::detach_"}


class _WatchWaysOut(TorchFunctionMode):
    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        why = WAYS_OUT.get(getattr(func, "__name__", ""))
        if why is not None and args and isinstance(args[0], torch.Tensor):
            self._recorder.refuse(f"Tensor.{func.__name__} {why}")
        return func(*args, **(kwargs or {}))


class Recorder(TorchDispatchMode):
    """Watches one call; see :func:`record`.

    Attributes:
        numbering: of the values.
        calls: in order.
        outputs: per tensor of the result its value, and which object: 0 is the value itself, others are views of it.
    """

    supports_higher_order_operators = True

    def __init__(self, tensors: Sequence[torch.Tensor], keep_outcomes: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[Call] = []
        self.outputs: list[tuple[int, int]] = []
        self.numbering = Numbering(tensors)
        self._unwritten = Unwritten()
        self._inside: Inside | None = None
        self._keep_outcomes = keep_outcomes
        self._is_blind = False  # while the recorder itself calls operators
        self._autocast = _autocast()

    @property
    def values(self) -> list[Value]:
        """By number; the arguments come first."""
        return self.numbering.values

    @property
    def refusal(self) -> str:
        """Why the call cannot be repeated from this recording, ``""`` where it can."""
        return self.numbering.refusal

    # -- what runs -----------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.refusal or self._is_blind:
            return func(*args, **kwargs)
        if self._inside is not None:
            self.refuse(self._inside.meet(args, kwargs, self.numbering))
            return self._inside.run(func, args, kwargs)
        if isinstance(func, torch._ops.HigherOrderOperator):
            self.refuse(f"{op_name(func)} is a higher-order operator")
            return func(*args, **kwargs)
        with self:  # composite operators are seen as what they are made of, in inference mode as elsewhere
            result = func.decompose(*args, **kwargs)
        return self._call(func, args, kwargs) if result is NotImplemented else result

    def _call(self, func: Any, args: Any, kwargs: Any) -> Any:
        try:
            call = self._begin(func, args, kwargs)
        except Exception as error:  # a fault of ours must not take the model down
            self._own_fault(error)
            call = None
        result = func(*args, **kwargs)
        if call is not None and not self.refusal:
            try:
                self._finish(call, result, private.tree_flatten((args, kwargs))[0], kwargs)
            except Exception as error:
                self._own_fault(error)
        return result

    def _begin(self, func: Any, args: Any, kwargs: Any) -> Call | None:
        """What is known of a call before it runs; ``None`` for one that need not be repeated, or cannot."""
        name = op_name(func)
        if name == "aten::lift_fresh" and self.numbering.is_new(args[0]):
            self.numbering.add(args[0], Kind.NUMBERS, here())
        if name in _TRANSPARENT:
            return None
        if why := reads_values(func, args, kwargs):
            self.refuse(why)
            return None
        leaves, spec = private.tree_flatten((args, kwargs))
        written = [t for t in nodes.leaves(list(declared_written(func, args, kwargs))) if isinstance(t, torch.Tensor)]
        memory = frozenset(map(private.storage_id, written))
        return Call(func, self.numbering.refs(leaves), spec, (), memory, why_live(func, args, leaves), here())

    def _finish(self, call: Call, result: Any, leaves: Sequence[Any], kwargs: Any) -> None:
        """Number what a call made, and keep the call unless it did nothing."""
        given = {ref.value: leaf for ref, leaf in zip(call.leaves, leaves, strict=True) if isinstance(ref, Ref)}
        if any(layout_of(tensor) != self.values[number].layout for number, tensor in given.items()):
            self.refuse(f"{op_name(call.function)} changes the form of a tensor in place")
        results = private.tree_flatten(result)[0]
        if odd := [] if private.returns_tensors_and_sizes(call.function) else _no_tensors(results):
            self.refuse(f"{op_name(call.function)} hands a {type(odd[0]).__name__} to Python")
        if self.refusal:
            return
        fresh = [isinstance(each, torch.Tensor) and self.numbering.is_new(each) for each in results]
        call.results = tuple(
            self.numbering.add(each, Kind.RESULT, call.origin) if new else None
            for each, new in zip(results, fresh, strict=True)
        )
        call.bare = isinstance(result, torch.Tensor)
        if any(fresh) or call.written or not any(isinstance(each, torch.Tensor) for each in results):
            made = [each for each, new in zip(results, fresh, strict=True) if new]
            self.refuse(self._unwritten.meet(call.function, leaves, kwargs, call.written, made))
            self._keep(call, results, given)  # anything else is a view that is what it views

    def _own_fault(self, error: Exception) -> None:
        log.warning("graphcap failed while it recorded a call, which goes on: %s", error, exc_info=error)
        self.refuse(f"graphcap failed: {type(error).__name__}: {error}")

    def _keep(
        self, call: Call, results: Sequence[Any], given: Mapping[int, torch.Tensor], asked: Collection[str] = ()
    ) -> None:
        self.calls.append(call)
        shared = {private.storage_id(each) for each in results if isinstance(each, torch.Tensor)} & set(
            self.numbering.outside
        )
        if not self._keep_outcomes or not call.live or shared:
            return
        self._is_blind = True
        try:
            made = [each.clone() for each, number in zip(results, call.results, strict=True) if number is not None]
            written = {n: t.clone() for n, t in given.items() if self.values[n].storage in call.written}
            call.outcome = Outcome(made, written, generator_states(), frozenset(asked))
        finally:
            self._is_blind = False

    # -- live functions ------------------------------------------------------------------------------------------------

    def live(self, fn: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """See :class:`graphcap.compiler.breakable.current.Recording`."""
        if self.refusal or self._inside is not None:
            return fn(*args, **kwargs)
        leaves, spec = private.tree_flatten((tuple(args), dict(kwargs)))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        name = getattr(fn, "__qualname__", repr(fn))
        call = Call(fn, self.numbering.refs(leaves), spec, (), frozenset(), f"@graphcap.eager function {name}", here())
        if _autocast() != self._autocast:
            self.refuse(f"{name} runs under another autocast than its caller")
        self._inside = inside = Inside(set(map(private.storage_id, tensors)))
        try:
            with asked_apart(inside.asked):
                result = fn(*args, **kwargs)
        finally:
            self._inside = None
        results = private.tree_flatten(result)[0]
        if odd := _no_tensors(results):
            self.refuse(f"{name} returns a {type(odd[0]).__name__}, on which what follows may depend")
        if not self.refusal:
            self._finish_live(call, inside, result, dict(zip(call.reads(), _each_once(tensors), strict=True)))
        return result

    def _finish_live(self, call: Call, inside: Inside, result: Any, given: Mapping[int, torch.Tensor]) -> None:
        results = private.tree_flatten(result)[0]
        self._unwritten.written(given.values())
        call.written, call.moves_on = frozenset(inside.written), inside.moves_on
        hidden = {
            self.numbering.number_in(tensor): tensor
            for key, tensor in inside.written.items()
            if key not in inside.given
        }
        call.also = tuple(hidden)
        # New values all of them: what it returns once, it need not return again.
        call.results = tuple(
            self.numbering.add(each, Kind.RESULT, call.origin) if isinstance(each, torch.Tensor) else None
            for each in results
        )
        for each, number in zip(results, call.results, strict=True):
            if number is not None:
                self.values[number].tensor = weakref.ref(each)
        call.bare = isinstance(result, torch.Tensor)
        self._keep(call, results, {**given, **hidden}, inside.asked)

    def refuse(self, why: str) -> None:
        """Watch no further; ``""`` is no reason. The first one counts; within a live function everything is allowed."""
        if why and (self._inside is None or why.startswith("an @graphcap.eager")):
            self.numbering.refuse(why)

    def close(self, result: Sequence[Any]) -> None:
        """Number the tensors of the call's result."""
        self.refuse(self._unwritten.returned(result))
        if not self.refusal:
            self.outputs = self.numbering.results(result)
        self.numbering.check_forms()


def record(
    run: Callable[[], Any], tensors: Sequence[torch.Tensor], keep_outcomes: bool = False
) -> tuple[Recorder, Any]:
    """Run a function and watch it.

    Args:
        run: the call.
        tensors: its arguments.
        keep_outcomes: keep what live calls did.

    Returns:
        The recording, and what the function returned.

    Raises:
        Exception: whatever the function raises.
    """
    recorder = Recorder(tensors, keep_outcomes)
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)  # a cast from an earlier call would come from nowhere
    current.set_recording(recorder)
    try:
        with recorder, _WatchWaysOut(recorder):
            result = run()
    finally:
        current.set_recording(None)
        torch.set_autocast_cache_enabled(cached)
    recorder.close(private.tree_flatten(result)[0])
    return recorder, result


def _no_tensors(results: Sequence[Any]) -> list[Any]:
    return [each for each in results if each is not None and not isinstance(each, torch.Tensor)]


def _each_once(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return list({identity(tensor): tensor for tensor in tensors}.values())


def _autocast() -> tuple[Any, ...]:
    return tuple(
        torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None for device in ("cpu", "cuda")
    )
