"""The contract between the compiler and the graph runtime: a flat list of steps over numbered slots.

The compiler hands over a :class:`Program`; this room captures and replays it. A program knows callables, tensors
and ints. It has never heard of FX, Inductor or models.

Slots ``0 .. len(inputs) - 1`` hold the call's arguments in order; every further slot is written by exactly one step.
Steps run in order. A step may write into its arguments in place (``mutates``).
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


class Capture(enum.Enum):
    """Whether a step may become part of a CUDA graph."""

    ALWAYS = "always"  #: a compiled piece whose shapes the key fixes: captured in PIECEWISE and in FULL
    FULL = "full"  #: cut out of its neighbours but functional (SDPA, flex_attention): captured in FULL only
    UNIFORM = "uniform_batch"  #: captured in FULL where every request of the batch brings the same number of tokens
    UNIFORM_SINGLE = "uniform_single_token"  #: captured in FULL where every request of the batch brings one token
    NEVER = "never"  #: runs live on every call; ``Step.reason`` says why


class InputKind(enum.Enum):
    """What the caller promises about one argument."""

    STATIC = "static"  #: a parameter, buffer or declared static argument: keeps its address between calls
    TENSOR = "tensor"  #: a tensor that may be a different one on every call
    SCALAR = "scalar"  #: an int or float (a SymInt placeholder of the graph)


@dataclass(frozen=True, slots=True)
class Size:
    """A size that follows a symbol: ``scale * symbol + offset``."""

    symbol: str
    scale: int = 1
    offset: int = 0

    def at(self, value: int) -> int:
        """The size where the symbol has this value."""
        return self.scale * value + self.offset

    def symbol_at(self, size: int) -> int:
        """The value of the symbol where this is the size."""
        return (size - self.offset) // self.scale


#: For :attr:`InputSpec.value_bound`: integers that are calculated with. Any would do, but for what is between inputs: a
#: length should not be larger than the lengths of a call.
ANY = 2**63 - 1

#: The size of one dim: fixed, following a symbol, or (``None``) depending on symbols in another way.
DimSize = int | Size | None


@dataclass(frozen=True, slots=True)
class InputSpec:
    """One argument of the program.

    Attributes:
        name: what a user would call it: ``"input_ids"``, ``"model.layers.0.mlp.up_proj.weight"``.
        kind: see :class:`InputKind`.
        symbol: for a scalar, the symbol or expression it holds (``"s77"``), otherwise ``None``.
        in_key: for a scalar, whether its value is part of the graph key. Steps that depend on a scalar outside the
            key are ``Capture.NEVER``.
        is_parameter: whether it is a model's parameter, by which one instance of the model is told from another.
        sizes: of a tensor, per dim; of a scalar the one that it is; empty where nothing is known.
        strides: of a tensor, per dim; empty where nothing is known.
        dim_names: the dims of a tensor that the user declared, each with the name that its size follows
            (``{0: "num_tokens"}``).
        is_write_index: whether its values say where something is written.
        value_bound: of integers and bools, the bound below which any other values from 0 on would do no harm: the rows
            of the table that they index, :data:`ANY` where they are calculated with, ``None`` where that is not known.
            For the proof of padding, which makes up values.
    """

    name: str
    kind: InputKind
    symbol: str | None = None
    in_key: bool = False
    is_parameter: bool = False
    sizes: tuple[DimSize, ...] = ()
    strides: tuple[DimSize, ...] = ()
    dim_names: Mapping[int, str] = field(default_factory=dict, hash=False)
    is_write_index: bool = False
    value_bound: int | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """One call: ``outputs = fn(*[slots[i] for i in reads])``.

    Attributes:
        name: ``"piece_3"``; the name in dumps, reports and profiles.
        fn: takes the read slots positionally, returns a tuple or list with one value per entry of ``writes``.
        reads: the argument slots, in order; a slot may occur twice.
        writes: the slots that receive the results.
        mutates: the slots among ``reads`` whose tensors ``fn`` writes in place.
        capture: see :class:`Capture`.
        reason: for all but ALWAYS, one line that says why, with the user's source line where it is known.
        symbols: the symbols that the sizes and numbers it reads or writes follow.
        unproven: the operations in it that are captured on somebody's word (declared custom ops, Triton kernels): the
            first replay is compared with a live run.
        moves_on: whether running it twice on the same is known to leave something else than running it once, in what it
            holds itself. It is not tried out, and the program not padded.
        eager: the same without compilation, called like ``fn``; ``None`` where that is not at hand. For profiles.
        into: the same for its one result, a tensor of a size that the key fixes, written into the tensor that it takes
            before what ``fn`` takes; ``None`` where it cannot.
    """

    name: str
    fn: Callable[..., Any]
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    mutates: tuple[int, ...] = ()
    capture: Capture = Capture.ALWAYS
    reason: str = ""
    symbols: frozenset[str] = frozenset()
    unproven: tuple[str, ...] = ()
    moves_on: bool = False
    eager: Callable[..., Any] | None = field(default=None, repr=False)
    into: Callable[..., Any] | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Constant:
    """An output of the program that is no slot: ``None``, an int, a string."""

    value: Any


@dataclass(frozen=True, slots=True)
class Program:
    """A compiled region, ready to run live or to be captured.

    Attributes:
        name: the region's name (``"forward_0"``), used in logs and reports.
        inputs: one spec per argument.
        steps: in execution order.
        outputs: per returned value the slot that holds it, or a :class:`Constant`.
        run: the stitched function: ``run(*args) -> tuple`` executes every step live, without any graph.
        output_sizes: per output the sizes of its dims as in :attr:`InputSpec.sizes`.
        largest: the symbols of dims that live in a buffer of the largest size and are not in the key, each with it.
        bounds: the symbols with a value beyond which the steps' functions do not hold, each with it; ``run`` does.
    """

    name: str
    inputs: tuple[InputSpec, ...]
    steps: tuple[Step, ...]
    outputs: tuple[int | Constant, ...]
    run: Callable[..., tuple[Any, ...]] = field(repr=False)
    output_sizes: tuple[tuple[DimSize, ...], ...] = ()
    largest: Mapping[str, int] = field(default_factory=dict)
    bounds: Mapping[str, int] = field(default_factory=dict)
