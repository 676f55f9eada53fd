"""A batch as far as a graph depends on it, and how it is going to run."""

from __future__ import annotations

import functools
import math
import reprlib
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

from graphcap.config import CUDAGraphMode
from graphcap.errors import StepError, did_you_mean

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
        if tags is not None:
            check_type("tags", tags, Mapping, "a dict of values by name")
        for name, value in (tags or {}).items():
            if not isinstance(name, str):
                raise StepError(f"tags: {name!r} is no name")
            try:
                hash(value)
            except TypeError:
                raise StepError(f"tags: {name}={value!r} is not hashable") from None
        return tuple(sorted((tags or {}).items(), key=lambda item: item[0]))


def check_type(name: str, value: object, wanted: type, what: str) -> None:
    """Refuse an argument of another type.

    Raises:
        StepError: it is not ``what`` is expected.
    """
    if not isinstance(value, wanted):
        raise StepError(f"{name}={reprlib.repr(value)}: expected {what}")


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
    if sizes is not None:
        check_type("sizes", sizes, Mapping, "a dict of numbers by the names of dims")
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
