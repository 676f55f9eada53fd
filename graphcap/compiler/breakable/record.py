"""One call, watched: every operator that runs, in order, with the values that it reads, makes and writes.

Two modes are on while the function runs. The dispatch mode sees operators below autograd and autocast, so what is
written down is what really ran. The function mode sees the few ways in which a value leaves for Python, or its address
for a kernel, without any operator. The function runs for real and its results are its own: a recording only watches,
and one that has met something that it cannot repeat says so and watches no further.

Values are numbered in the order in which they show up. A value is known by its memory and layout, not by its Python
object, as autograd hands out new objects for the same view. Storages are remembered weakly: a recording keeps alive
no more than the function itself does, and yet no storage is taken for an earlier one at the same address.
"""

from __future__ import annotations

import enum
import gc
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from graphcap.compiler import nodes, private
from graphcap.compiler.breakable import current
from graphcap.compiler.breakable.key import PLAIN, layout_of, same_leaf
from graphcap.compiler.breakable.origin import Origin, here
from graphcap.compiler.effects import declared_written
from graphcap.compiler.rules import HOST_SYNC_OPS, op_name, target_never_captured


class Kind(enum.Enum):
    """Where a value comes from."""

    ARGUMENT = "argument"
    OUTSIDE = "outside"  #: neither an argument nor made in the call: a parameter, a global, a tensor in a closure
    NUMBERS = "numbers"  #: made from Python numbers in the call: ``torch.tensor(3.0)``
    RESULT = "result"


def _nothing() -> None:
    return None


@dataclass(slots=True)
class Value:
    """One value of a recorded call.

    Attributes:
        storage: identity of its memory, within this recording.
        layout: see :func:`~graphcap.compiler.breakable.key.layout_of`.
        origin: where it showed up.
        tensor: for what comes from outside or out of a live call, without keeping it alive.
        numbers: for what was made of Python numbers, a copy of it as it was made.
    """

    kind: Kind
    storage: int
    layout: tuple[Any, ...]
    origin: Origin
    tensor: Callable[[], torch.Tensor | None] = _nothing
    numbers: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Ref:
    """Stands for the value of this number among the arguments of a call."""

    value: int


@dataclass(frozen=True, slots=True)
class Weak:
    """Stands for an object among the arguments of a call that must not be kept alive, such as the model."""

    object: Callable[[], Any]


@dataclass(slots=True)
class Call:
    """One operator or one ``@graphcap.eager`` function.

    Attributes:
        function: the operator, or the user's own function.
        leaves, spec: its arguments, flat; tensors are :class:`Ref`, objects that are no plain values :class:`Weak`.
        also: values that it reads or writes without being given them.
        results: per leaf of its result the number of a new value, ``None`` for one that was known or is no tensor.
        bare: whether it returned one tensor, and no container of tensors.
        written: the storages that it writes.
        live: why a graph cannot hold it, ``""`` where one can.
        origin: where the user wrote it.
        outcome: in a recording that keeps outcomes, what a live call did; ``None`` where that cannot be repeated.
    """

    function: Any
    leaves: tuple[Any, ...]
    spec: Any
    results: tuple[int | None, ...]
    written: frozenset[int]
    live: str
    origin: Origin
    also: tuple[int, ...] = ()
    bare: bool = True
    outcome: Outcome | None = None

    def reads(self) -> list[int]:
        """The values that it reads, each once, those that it is given first."""
        return list(dict.fromkeys([*(leaf.value for leaf in self.leaves if isinstance(leaf, Ref)), *self.also]))


@dataclass(slots=True)
class Outcome:
    """What a live call did, for a replay that must not do it again.

    Attributes:
        results: copies of the tensors that it made.
        written: per value that it wrote a copy of what stood there afterwards.
        generators: the state of the random number generators afterwards.
    """

    results: list[torch.Tensor]
    written: dict[int, torch.Tensor]
    generators: Any


#: Ways out of torch without an operator. What lies behind them is invisible, so it belongs in ``@graphcap.eager``.
_WAYS_OUT = {
    "tolist": "hands values to Python",
    "numpy": "hands its memory to numpy",
    "__array__": "hands its memory to numpy",
    "__dlpack__": "hands its memory to another library",
    "data_ptr": "hands its address to a kernel that torch does not know",
}
#: Give back what they were given; nothing to do in a replay.
_TRANSPARENT = {"aten::lift_fresh", "aten::detach_"}
_MASKS = (torch.bool, torch.uint8)


class _WatchWaysOut(TorchFunctionMode):
    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        why = _WAYS_OUT.get(getattr(func, "__name__", ""))
        if why is not None and args and isinstance(args[0], torch.Tensor):
            self._recorder.refuse(f"Tensor.{func.__name__} {why}")
        return func(*args, **(kwargs or {}))


@dataclass(slots=True)
class _Inside:
    """What happens within a live function, by storage: what it was given, meets, makes and writes."""

    given: set[int]
    met: dict[int, torch.Tensor] = field(default_factory=dict)  # the first one, before any view of it
    made: set[int] = field(default_factory=set)
    written: dict[int, torch.Tensor] = field(default_factory=dict)


class Recorder(TorchDispatchMode):
    """Watches one call; see :func:`record`.

    Attributes:
        values: by number; the arguments come first.
        calls: in order.
        outputs: per tensor of the result its value, and which object: 0 is the value itself, others are views of it.
        refusal: why the call cannot be repeated from this recording, ``""`` where it can.
    """

    supports_higher_order_operators = True

    def __init__(self, tensors: Sequence[torch.Tensor], keep_outcomes: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.values: list[Value] = []
        self.calls: list[Call] = []
        self.outputs: list[tuple[int, int]] = []
        self.refusal = ""
        self._known: dict[tuple[Any, ...], int] = {}
        self._made: dict[int, tuple[Callable[[], bool], Origin]] = {}
        self._outside: dict[int, int] = {}  # by storage the first value from outside in it
        self._inside: _Inside | None = None
        self._keep_outcomes = keep_outcomes
        self._is_blind = False  # while the recorder itself calls operators
        self._autocast = _autocast()
        for tensor in tensors:
            self._add(tensor, Kind.ARGUMENT, Origin("", "", ""))

    # -- what runs -----------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.refusal or self._is_blind:
            return func(*args, **kwargs)
        if self._inside is not None:
            return self._watch_inside(func, args, kwargs)
        if isinstance(func, torch._ops.HigherOrderOperator):
            self.refuse(f"{op_name(func)} is a higher-order operator")
            return func(*args, **kwargs)
        with self:  # composite operators are seen as what they are made of, in inference mode as elsewhere
            result = func.decompose(*args, **kwargs)
        return self._call(func, args, kwargs) if result is NotImplemented else result

    def _call(self, func: Any, args: Any, kwargs: Any) -> Any:
        name = op_name(func)
        if name == "aten::lift_fresh" and self._unknown(args[0]):
            self._add(args[0], Kind.NUMBERS, here())
        if name in _TRANSPARENT:
            return func(*args, **kwargs)
        if why := reads_values(func, args, kwargs):
            self.refuse(why)
            return func(*args, **kwargs)
        leaves, spec = private.tree_flatten((args, kwargs))
        given = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        refs = self._refs(leaves)
        written = [t for t in nodes.leaves(list(declared_written(func, args, kwargs))) if isinstance(t, torch.Tensor)]
        call = Call(
            func, refs, spec, (), frozenset(map(private.storage_id, written)), why_live(func, args, leaves), here()
        )
        result = func(*args, **kwargs)
        numbers_given = [ref.value for ref in refs if isinstance(ref, Ref)]
        if any(layout_of(t) != self.values[n].layout for t, n in zip(given, numbers_given, strict=True)):
            self.refuse(f"{name} changes the form of a tensor in place")
        results = private.tree_flatten(result)[0]
        if odd := _no_tensors(results):
            self.refuse(f"{name} hands a {type(odd[0]).__name__} to Python")
        if not self.refusal:
            self._finish(call, result, dict(zip(numbers_given, given, strict=True)))
        return result

    def _finish(self, call: Call, result: Any, given: Mapping[int, torch.Tensor]) -> None:
        """Number what a call made, and keep the call unless it did nothing."""
        results = private.tree_flatten(result)[0]
        fresh = [isinstance(each, torch.Tensor) and self._unknown(each) for each in results]
        numbers = [
            self._add(each, Kind.RESULT, call.origin) if new else None for each, new in zip(results, fresh, strict=True)
        ]
        call.results = tuple(numbers)
        call.bare = isinstance(result, torch.Tensor)
        if not any(fresh) and not call.written and any(isinstance(each, torch.Tensor) for each in results):
            return  # a view that is what it views
        self._keep(call, results, given)

    def _keep(self, call: Call, results: Sequence[Any], given: Mapping[int, torch.Tensor]) -> None:
        self._is_blind = True
        shared = {private.storage_id(each) for each in results if isinstance(each, torch.Tensor)} & set(self._outside)
        if self._keep_outcomes and call.live and not shared:
            made = [each.clone() for each, number in zip(results, call.results, strict=True) if number is not None]
            written = {n: t.clone() for n, t in given.items() if self.values[n].storage in call.written}
            call.outcome = Outcome(made, written, generator_states())
        self.calls.append(call)
        self._is_blind = False

    # -- live functions ------------------------------------------------------------------------------------------------

    def live(self, fn: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """See :class:`graphcap.compiler.breakable.current.Recording`."""
        if self.refusal or self._inside is not None:
            return fn(*args, **kwargs)
        leaves, spec = private.tree_flatten((tuple(args), dict(kwargs)))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        name = getattr(fn, "__qualname__", repr(fn))
        call = Call(fn, self._refs(leaves), spec, (), frozenset(), f"@graphcap.eager function {name}", here())
        if _autocast() != self._autocast:
            self.refuse(f"{name} runs under another autocast than its caller")
        self._inside = inside = _Inside(set(map(private.storage_id, tensors)))
        try:
            result = fn(*args, **kwargs)
        finally:
            self._inside = None
        results = private.tree_flatten(result)[0]
        if odd := _no_tensors(results):
            self.refuse(f"{name} returns a {type(odd[0]).__name__}, on which what follows may depend")
        if self.refusal:
            return result
        given = dict(zip(call.reads(), _each_once(tensors), strict=True))
        call.written = frozenset(inside.written)
        hidden = {self._number_in(tensor): tensor for key, tensor in inside.written.items() if key not in inside.given}
        call.also = tuple(hidden)
        # New values all of them: what it returns once, it need not return again.
        call.results = tuple(
            self._add(each, Kind.RESULT, call.origin) if isinstance(each, torch.Tensor) else None for each in results
        )
        for each, number in zip(results, call.results, strict=True):
            if number is not None:
                self.values[number].tensor = weakref.ref(each)
        call.bare = isinstance(result, torch.Tensor)
        self._keep(call, results, given | hidden)
        return result

    def _watch_inside(self, func: Any, args: Any, kwargs: Any) -> Any:
        inside = self._inside
        assert inside is not None
        for tensor in nodes.leaves([*args, *kwargs.values()]):
            if isinstance(tensor, torch.Tensor) and not self.refusal:
                storage = private.storage_id(tensor)
                inside.met.setdefault(storage, tensor)
                if storage in self._made and storage not in inside.given | inside.made:
                    self.refuse(
                        f"an @graphcap.eager function uses a value of {self._made[storage][1]} without being given it"
                    )
        for tensor in nodes.leaves(list(declared_written(func, args, kwargs))):
            if isinstance(tensor, torch.Tensor) and private.storage_id(tensor) not in inside.made:
                storage = private.storage_id(tensor)
                inside.written.setdefault(storage, inside.met.get(storage, tensor))
        result = func(*args, **kwargs)
        before = {private.storage_id(each) for each in nodes.leaves([*args, *kwargs.values()]) if torch.is_tensor(each)}
        inside.made |= {private.storage_id(each) for each in nodes.leaves(result) if torch.is_tensor(each)} - before
        return result

    # -- values --------------------------------------------------------------------------------------------------------

    def refuse(self, why: str) -> None:
        """Watch no further. The first reason counts; within a live function everything is allowed."""
        if self._inside is None or why.startswith("an @graphcap.eager"):
            self.refusal = self.refusal or f"{why} ({here()})"

    def _number(self, tensor: torch.Tensor) -> int:
        """The number of a value, which comes from outside where it was not met before."""
        if not self._unknown(tensor):
            return self._known[_identity(tensor)]
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.layout is not torch.strided:
            self.refuse(f"{type(tensor).__name__} with layout {tensor.layout}: only plain tensors can be recorded")
        elif private.storage_id(tensor) in self._made:
            self.refuse("a view was made that no operator shows")
        return self._add(tensor, Kind.OUTSIDE, here())

    def _number_in(self, tensor: torch.Tensor) -> int:
        """The number of any value from outside in a tensor's memory."""
        known = self._outside.get(private.storage_id(tensor))
        return self._number(tensor) if known is None else known

    def _refs(self, leaves: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(Ref(self._number(leaf)) if isinstance(leaf, torch.Tensor) else _weak(leaf) for leaf in leaves)

    def _unknown(self, tensor: torch.Tensor) -> bool:
        return _identity(tensor) not in self._known

    def _add(self, tensor: torch.Tensor, kind: Kind, origin: Origin) -> int:
        number, storage = len(self.values), private.storage_id(tensor)
        self._known[_identity(tensor)] = number
        value = Value(kind, storage, layout_of(tensor), origin)
        if kind in (Kind.ARGUMENT, Kind.OUTSIDE):
            value.tensor = weakref.ref(tensor)
            self._outside.setdefault(storage, number)
        elif storage not in self._outside and storage not in self._made:
            self._made[storage] = private.weak_storage(tensor), origin
        if kind is Kind.NUMBERS:
            value.numbers = tensor.clone()
        self.values.append(value)
        return number

    def close(self, result: Sequence[Any]) -> None:
        """Number the tensors of the call's result."""
        objects: dict[int, list[int]] = {}
        for leaf in result:
            if isinstance(leaf, torch.Tensor) and not self.refusal:
                number = self._number(leaf)
                itself = self.values[number].tensor()
                # Of what an operator made any object is the value; a live call may have returned what it was given.
                seen = objects.setdefault(number, [] if self.values[number].tensor is _nothing else [id(itself)])
                if id(leaf) not in seen:
                    seen.append(id(leaf))
                self.outputs.append((number, seen.index(id(leaf))))
                if leaf.requires_grad and leaf is not itself:
                    self.refuse("a result needs grad: call it under torch.no_grad() or torch.inference_mode()")
        for value in self.values:
            if (tensor := value.tensor()) is not None and layout_of(tensor) != value.layout:
                self.refuse("a tensor was given another form or dtype in place")

    def outlived(self, result: Sequence[Any]) -> str:
        """Which value of the call is still alive though it was not returned, ``""`` if none is: a replay makes none."""
        returned = {private.storage_id(leaf) for leaf in result if isinstance(leaf, torch.Tensor)}
        left = [storage for storage, (expired, _) in self._made.items() if storage not in returned and not expired()]
        if left:
            gc.collect()
            left = [storage for storage in left if not self._made[storage][0]()]
        origins = [self._made[storage][1] for storage in left]
        return f"the value made at {origins[0]} is kept beyond the call, which a replay would not do" if origins else ""


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


def difference(a: Recorder, b: Recorder) -> str:
    """Where two recordings part, in one line; ``""`` where one could stand for the other.

    Values that were made of Python numbers must have equal bits, those from outside must be the same tensor.
    """
    for first, second in zip(a.calls, b.calls, strict=False):
        if first.function is not second.function:
            return f"{_name(first)} at {first.origin} in one call, {_name(second)} at {second.origin} in the next"
        same = len(first.leaves) == len(second.leaves) and all(map(_same_argument, first.leaves, second.leaves))
        if not same or first.spec != second.spec or first.results != second.results or first.also != second.also:
            return f"{_name(first)} at {first.origin} has other arguments in the next call"
    if len(a.calls) != len(b.calls):
        longer = max(a.calls, b.calls, key=len)
        extra = longer[min(len(a.calls), len(b.calls))]
        return f"{_name(extra)} at {extra.origin} runs in one of two calls"
    if len(a.values) != len(b.values) or a.outputs != b.outputs:
        return "the calls return different values"
    for one, other in zip(a.values, b.values, strict=True):
        if one.kind is not other.kind or one.layout != other.layout:
            return f"a tensor used at {one.origin} has another layout in the next call"
        if one.kind is Kind.NUMBERS and not _same_bits(one.numbers, other.numbers):
            return f"the tensor made from numbers at {one.origin} has other values in the next call"
        if one.kind is Kind.OUTSIDE and (one.tensor() is not other.tensor() or one.tensor() is None):
            return f"another tensor is used at {one.origin} in the next call"
    return ""


def reads_values(func: Any, args: Any, kwargs: Any) -> str:
    """Why an operator makes Python depend on values: it returns them, or a tensor of so many rows."""
    name = op_name(func)
    if func.namespace == "aten" and name.rpartition("::")[2] in HOST_SYNC_OPS:
        return f"{name} waits for a value; put it into an @graphcap.eager function"
    if torch.Tag.data_dependent_output in func.tags:
        return f"{name} waits for a value; put it into an @graphcap.eager function"
    if torch.Tag.dynamic_output_shape in func.tags and kwargs.get("output_size") is None:
        if name == "aten::index" and not _has_mask(args):
            return ""
        return f"the values that {name} reads decide the size of its result; put it into an @graphcap.eager function"
    return ""


def why_live(func: Any, args: Any, leaves: Sequence[Any]) -> str:
    """Why a graph cannot hold this call, ``""`` where it can."""
    name = op_name(func)
    if any(isinstance(leaf, torch.Generator) for leaf in leaves):
        return f"{name} draws from a generator of its own"
    if name in ("aten::index_put", "aten::index_put_", "aten::_index_put_impl_") and _has_mask(args):
        return f"{name} with a mask waits for the number of rows"
    return target_never_captured(func) or ""


def generator_states() -> list[torch.Tensor]:
    """The states of the generators that operators draw from by default: the CPU's, and that of each used GPU."""
    used = torch.cuda.is_available() and torch.cuda.is_initialized()
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if used else [])]


def set_generator_states(states: Sequence[torch.Tensor]) -> None:
    """The inverse of :func:`generator_states`."""
    torch.set_rng_state(states[0])
    if states[1:]:
        torch.cuda.set_rng_state_all(list(states[1:]))


def _has_mask(args: Any) -> bool:
    return any(isinstance(each, torch.Tensor) and each.dtype in _MASKS for each in args[1])


def _identity(tensor: torch.Tensor) -> tuple[Any, ...]:
    if tensor.layout is not torch.strided:
        return (id(tensor),)
    marks = tensor.is_conj(), tensor.is_neg()
    return private.storage_id(tensor), tensor.storage_offset(), *layout_of(tensor), *marks


def _weak(leaf: Any) -> Any:
    if isinstance(leaf, (*PLAIN, FunctionType)):
        return leaf
    try:
        return Weak(weakref.ref(leaf))
    except TypeError:
        return leaf


def _no_tensors(results: Sequence[Any]) -> list[Any]:
    return [each for each in results if each is not None and not isinstance(each, torch.Tensor)]


def _each_once(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return list({_identity(tensor): tensor for tensor in tensors}.values())


def _same_argument(a: Any, b: Any) -> bool:
    if isinstance(a, Weak) and isinstance(b, Weak):
        return a.object() is b.object() is not None
    return a == b if isinstance(a, Ref) and isinstance(b, Ref) else same_leaf(a, b)


def _autocast() -> tuple[Any, ...]:
    return tuple(
        torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None for device in ("cpu", "cuda")
    )


def _name(call: Call) -> str:
    return op_name(call.function)


def _same_bits(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    assert a is not None and b is not None
    return bool(torch.equal(a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8)))
