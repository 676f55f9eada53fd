"""What kind of batch the current forward is: said by an engine around the call, read by the graph runtime and by ops.

A model's arguments show its sizes. They do not show that every request of a batch brings one token, that an adapter is
active, or the attention metadata that an op fetches from the side. :class:`step` says it::

    with graphcap.step(num_tokens=37, num_reqs=37, uniform_query_len=1, tags={"lora": 2}, inputs={"seq_lens": lens}):
        model(input_ids, positions)

A step holds for its thread or task; steps nest, the innermost counts.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Hashable, Iterable, Iterator, Mapping
from contextvars import ContextVar, Token
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from graphcap.config import CUDAGraphMode
from graphcap.errors import StepError, did_you_mean

if TYPE_CHECKING:
    from graphcap.cudagraph.dispatch.metadata import Serving

#: Modes that one call can have, from less to more.
RUNTIME_MODES = (CUDAGraphMode.NONE, CUDAGraphMode.PIECEWISE, CUDAGraphMode.FULL)


@dataclass(frozen=True, slots=True)
class GraphKey:
    """A batch, as far as a graph depends on it.

    Attributes:
        num_tokens: rows of the batch; the product of ``sizes`` where no dim is called so.
        num_reqs: requests in it; ``None`` where nobody counts them.
        uniform_query_len: the tokens of each request where all have the same number (1 in plain decode, more in
            speculative decoding); ``None`` for a mixed batch.
        tags: what else distinguishes the batch, sorted by name.
        sizes: of the dims with other names, sorted by name: ``(("batch", 8), ("seq", 128))``. :meth:`size` reads them.

    Raises:
        StepError: sizes that no batch has.
    """

    num_tokens: int
    num_reqs: int | None = None
    uniform_query_len: int | None = None
    tags: tuple[tuple[str, Hashable], ...] = ()
    sizes: tuple[tuple[str, int], ...] = ()

    @staticmethod
    def of_sizes(sizes: Mapping[str, int], num_tokens: int | None = None, **others: Any) -> GraphKey:
        """The key of a batch by the names of its dims.

        Args:
            sizes: by name.
            num_tokens: where that is no name of a dim; otherwise the product of ``sizes``.
            others: fields of the key.

        Raises:
            StepError: as for the class, or a name that has an argument of its own.
        """
        for name, size in sizes.items():
            if name in ("num_tokens", "num_reqs"):
                raise StepError(f"sizes: {name!r} is not the name of a further dim")
            _check_count(name, size)
        tokens = math.prod(sizes.values()) if num_tokens is None else num_tokens
        return GraphKey(tokens, sizes=tuple(sorted(sizes.items())), **others)

    def size(self, name: str) -> int:
        """The size of a named dim, ``"num_tokens"`` and ``"num_reqs"`` included.

        Raises:
            StepError: the key does not have it.
        """
        found = {"num_tokens": self.num_tokens, "num_reqs": self.num_reqs, **dict(self.sizes)}
        size = found.get(name)
        if size is None:
            raise StepError(f"this batch has no {name!r}; {did_you_mean(name, found)}")
        return size

    def __str__(self) -> str:
        if self.sizes:
            tokens = "" if self.num_tokens == math.prod(n for _, n in self.sizes) else f"{self.num_tokens} tokens, "
            return tokens + ", ".join(f"{name}={size}" for name, size in self.sizes)
        if self.uniform_query_len is not None:
            return f"{self.num_tokens} tokens, {self.uniform_query_len} for each request"
        return f"{self.num_tokens} tokens"

    def __post_init__(self) -> None:
        if any(hasattr(size, "node") for size in (self.num_tokens, self.num_reqs, self.uniform_query_len)):
            return  # a torch.SymInt: shapes are worked out on fake tensors, nothing runs and nothing is looked up
        for name in ("num_tokens", "num_reqs", "uniform_query_len"):
            if (value := getattr(self, name)) is not None:
                _check_count(name, value)
        length, reqs = self.uniform_query_len, self.num_reqs
        if length is not None and (length == 0 or self.num_tokens % length):
            raise StepError(f"num_tokens={self.num_tokens} is no multiple of uniform_query_len={length}")
        if length is not None and reqs is not None and reqs * length != self.num_tokens:
            raise StepError(f"num_tokens={self.num_tokens} is not num_reqs={reqs} x uniform_query_len={length}")

    @staticmethod
    def sorted_tags(tags: Mapping[str, Hashable] | None) -> tuple[tuple[str, Hashable], ...]:
        """Tags in the form that the key holds.

        Raises:
            StepError: a name that is no string, or a value that cannot be compared.
        """
        for name, value in (tags or {}).items():
            if not isinstance(name, str):
                raise StepError(f"tags: {name!r} is no name")
            try:
                hash(value)
            except TypeError:
                raise StepError(f"tags: {name}={value!r} is not hashable") from None
        return tuple(sorted((tags or {}).items(), key=lambda item: item[0]))


def _check_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise StepError(f"{name}={value!r}: expected a number of at least 0")


@dataclass(frozen=True, slots=True)
class Dispatch:
    """How a call is going to run, decided before it, so that metadata can be built at the padded sizes.

    Attributes:
        mode: NONE, PIECEWISE or FULL.
        num_tokens: rows of the padded batch; the real number where nothing is padded.
        num_reqs: requests of the padded batch; ``None`` where nobody counts them.
        key: the real batch.
        reason: for NONE, why.
        sizes: of the padded batch, for the dims with other names.
    """

    mode: CUDAGraphMode
    num_tokens: int
    num_reqs: int | None
    key: GraphKey
    reason: str = ""
    sizes: tuple[tuple[str, int], ...] = ()


def key_of(
    num_tokens: int | None,
    num_reqs: int | None,
    uniform_query_len: int | None,
    tags: Mapping[str, Hashable] | None,
    sizes: Mapping[str, int] | None,
) -> GraphKey:
    """The key of a batch as a user describes it.

    Raises:
        StepError: sizes that no batch has, or too few of them.
    """
    sorted_tags = GraphKey.sorted_tags(tags)
    if sizes:
        others = {"num_reqs": num_reqs, "uniform_query_len": uniform_query_len, "tags": sorted_tags}
        return GraphKey.of_sizes(sizes, num_tokens, **others)
    if num_tokens is None:
        raise StepError("num_tokens is missing: a batch is known by its number of tokens first")
    plain = type(num_tokens) is int and {type(num_reqs), type(uniform_query_len)} <= _COUNTS
    # Serving says the same few batches again and again: to look one up is a quarter of what its checks take.
    make = _known_key if plain and not sorted_tags else GraphKey
    return make(num_tokens, num_reqs, uniform_query_len, sorted_tags)


_COUNTS = {int, type(None)}
_known_key = functools.lru_cache(maxsize=4096)(GraphKey)


class step:
    """Say what batch the calls inside of the ``with`` block have.

    Args:
        num_tokens: rows of the batch.
        num_reqs: requests in it.
        uniform_query_len: the tokens of each request where all have the same number. It is a promise: ops declared with
            ``register_op(capture="uniform_batch")`` are captured on the strength of it.
        tags: what else distinguishes the batch. Tags named in ``specialize_tags`` have plans of their own.
        sizes: of the dims with other names; with them ``num_tokens`` may be left out, and is their product.
        key: all of these at once, instead.
        dispatch: a decision of :func:`graphcap.dispatch` that the calls follow.
        max_mode: NONE, PIECEWISE or FULL (or their names): the most that these calls may use.
        inputs: tensors that ops of the model read, and never write, as ``graphcap.current_step().inputs[name]``. Their
            dynamic dims are declared on the model, as ``dynamic_arg_dims={"step.seq_lens": {0: "num_reqs"}}``.

    Raises:
        StepError: sizes that no batch has, or arguments that contradict each other.
    """

    __slots__ = ("_token", "dispatch", "inputs", "key", "max_mode", "token")

    def __init__(
        self,
        num_tokens: int | None = None,
        num_reqs: int | None = None,
        uniform_query_len: int | None = None,
        tags: Mapping[str, Hashable] | None = None,
        *,
        sizes: Mapping[str, int] | None = None,
        key: GraphKey | None = None,
        dispatch: Dispatch | None = None,
        max_mode: CUDAGraphMode | str | None = None,
        inputs: Mapping[str, Any] | None = None,
    ) -> None:
        sized = num_tokens is not None or num_reqs is not None or uniform_query_len is not None
        given = sized or tags is not None or sizes is not None
        if key is not None and given:
            raise StepError("give key= or the sizes one by one, not both")
        if key is None and (num_tokens is not None or sizes):
            key = key_of(num_tokens, num_reqs, uniform_query_len, tags, sizes)
        elif key is None and given:
            raise StepError("num_tokens is missing: a batch is known by its number of tokens first")
        if key is None and dispatch is not None:
            key = dispatch.key
        self.key = key
        self.dispatch = dispatch
        self.max_mode = as_runtime_mode(max_mode)
        self.inputs = StepInputs(inputs or {})
        decided = dispatch and (dispatch.mode, dispatch.num_tokens, dispatch.num_reqs, dispatch.sizes)
        #: What a table of plans must tell apart besides the sizes of the arguments.
        self.token: Hashable = (
            key and (key.num_reqs, key.uniform_query_len, key.tags), decided, self.max_mode, self.inputs.names
        )  # fmt: skip
        self._token: Token[step | None] | None = None

    def __enter__(self) -> step:
        if self._token is not None:
            raise StepError("this step is in progress already; make a new one for a nested call")
        self._token = _current.set(self)
        return self

    def __exit__(self, *_: object) -> None:
        token, self._token = self._token, None
        if token is not None:
            _current.reset(token)


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


_current: ContextVar[step | None] = ContextVar("graphcap_step", default=None)
#: Whose buffers ops of the model find instead of the step's own inputs.
serving_now: ContextVar[Serving | None] = ContextVar("graphcap_serving", default=None)

#: The step in force, or ``None``. Bound once: it is called for every replay.
current = _current.get


def current_step() -> step:
    """The innermost step in force.

    Raises:
        StepError: outside of every step.
    """
    found = _current.get()
    if found is None:
        raise StepError("no graphcap.step(...) is in force here")
    return found


@contextlib.contextmanager
def inputs_asked_for() -> Iterator[set[str]]:
    """Gathers the names that ops look for within it among the inputs of the step in force."""
    said = _current.get()
    if said is None:
        yield set()
        return
    before, said.inputs.asked = said.inputs.asked, set()
    try:
        yield said.inputs.asked
    finally:
        said.inputs.asked = before


def as_runtime_mode(mode: CUDAGraphMode | str | None) -> CUDAGraphMode | None:
    """One of NONE, PIECEWISE and FULL, by member or name.

    Raises:
        StepError: anything else.
    """
    if mode is None:
        return None
    found = CUDAGraphMode.__members__.get(mode.upper()) if isinstance(mode, str) else mode
    if found not in RUNTIME_MODES:
        raise StepError(f"max_mode={mode!r}: expected NONE, PIECEWISE or FULL")
    return found
