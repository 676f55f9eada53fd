"""What a caller sees is what eager shows: values, strides, aliasing, state, identity. One named case per promise."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo import mark_dynamic

import graphcap
from graphcap.compiler.eager_functions import eager
from tests.compiler.like_eager import Arguments, assert_like_eager
from tests.compiler.random_programs import OPERATIONS, Operation, random_program


@eager
def live(x: Tensor) -> Tensor:
    return x * 3


@eager
def live_in_place(x: Tensor) -> None:
    x.add_(1)


@eager
def live_view(x: Tensor) -> Tensor:
    return x.t()


@torch.library.custom_op("graphcap_test_semantics::append", mutates_args=("cache",))
def append(cache: Tensor, new: Tensor, at: int) -> None:
    cache[at : at + new.shape[0]] = new


@append.register_fake
def _(cache: Tensor, new: Tensor, at: int) -> None:
    return None


def x(*shape: int) -> Tensor:
    return torch.randn(shape or (4, 6))


class Case(NamedTuple):
    """``fn`` is a function or makes a module; ``inputs`` makes the arguments of call ``i``."""

    fn: Callable[..., Any]
    inputs: Callable[[int], Any] = lambda i: (x(),)
    module: bool = False
    options: dict[str, Any] = {}  # noqa: RUF012


CASES: dict[str, Case] = {}


def case(name: str, inputs: Callable[[int], Any] = lambda i: (x(),), **options: Any) -> Callable[[Any], Any]:
    """Add a function, or a module class, to the cases."""

    def add(fn: Any) -> Any:
        CASES[name] = Case(fn, inputs, isinstance(fn, type), options)
        return fn

    return add


# -- merging, folding, twins ------------------------------------------------------------------------------------------


@case("pieces merge around a cut")
def _(x: Tensor) -> Tensor:
    return live(x.sin() + 1).cos() * 2


@case("views fold into the cut beside them")
def _(x: Tensor) -> Tensor:
    return live(live(x + 1).transpose(0, 1)) + 1


@case("attention with views around it", lambda i: (x(2, 4, 8),))
def _(x: Tensor) -> Tensor:
    q = (x * 2).view(2, 4, 2, 4).transpose(1, 2)
    return F.scaled_dot_product_attention(q, q, q, is_causal=True).transpose(1, 2).reshape(2, 4, 8) + x


@case("twins", lambda i: (x(2, 4, 8),))
class Twins(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + live(layer(x))
        return x


# -- inputs and outputs -----------------------------------------------------------------------------------------------


@case("tuple and list in, tuple out", lambda i: ((x(), [x(), x()]),))
def _(pair: Any) -> Any:
    a, (b, c) = pair
    return live(a + b), (c * 2, [a - c])


@case("dict in, dict out", lambda i: ({"a": x(), "b": {"c": x()}},))
def _(d: Any) -> Any:
    return {"sum": live(d["a"] + d["b"]["c"]), "same": d["a"]}


@case("keyword arguments and defaults", lambda i: Arguments((x(),), {"scale": 2.0, "other": x()}))
def _(x: Tensor, scale: float = 1.0, other: Tensor | None = None, shift: int = 3) -> Tensor:
    assert other is not None
    return live(x * scale + other) + shift


@case("None in and out", lambda i: (x(), None))
def _(x: Tensor, mask: Tensor | None) -> Any:
    return live(x + 1 if mask is None else x * mask), mask, None


@case("ints floats bools and strings out")
def _(x: Tensor) -> Any:
    return live(x + 1), 7, 2.5, True, "text", x.shape[0]


@case("an int that is the same", lambda i: (x(), 3))
def _(x: Tensor, n: int) -> Tensor:
    return live(x * n) + n


@case("an int that changes", lambda i: (x(), 5 + i), calls=8, replayed=False)
def _(x: Tensor, n: int) -> Any:
    return live(x * n) + n, n + 1


@case("a float that changes", lambda i: (x(), 0.5 + i), calls=8, replayed=False)
def _(x: Tensor, f: float) -> Any:
    return live(x * f) + f, f * 2


@case("a bool that changes", lambda i: (x(), i % 2 == 0), calls=8)
def _(x: Tensor, flag: bool) -> Tensor:
    return live(x + 1) if flag else live(x - 1) * 2


@dataclasses.dataclass
class Batch:
    ids: Tensor
    scale: float


torch.utils._pytree.register_dataclass(Batch)


@case("dataclass in and out", lambda i: (Batch(x(), 2.0),))
def _(batch: Batch) -> Batch:
    return Batch(live(batch.ids * batch.scale) + 1, batch.scale)


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


@case("named tuple in and out", lambda i: (Pair(x(), x()),))
def _(pair: Pair) -> Pair:
    return Pair(live(pair.second + 1), pair.first * 2)


@case("no tensor output", lambda i: (x(),), replayed=False)
def _(x: Tensor) -> int:
    x + 1
    return 3


@case("no input")
class NoInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4))

    def forward(self, _x: Tensor) -> Tensor:
        return live(self.w * 2) + 1


@case("the same tensor passed twice", lambda i: (lambda t: (t, t))(x()))
def _(a: Tensor, b: Tensor) -> Any:
    return live(a + b) * 2, a, b


@case("integer and bool and half tensors", lambda i: (torch.arange(6) + i, torch.tensor([True, False]), x().half()))
def _(ids: Tensor, flag: Tensor, h: Tensor) -> Any:
    return live(ids + 1) * 2, ~flag, h * 2


@case("zero-dimensional tensor", lambda i: (torch.tensor(float(i)),))
def _(x: Tensor) -> Tensor:
    return live(x + 1) * 2


@case("non-contiguous input", lambda i: (x(4, 6).t(), x(8, 6)[::2]))
def _(a: Tensor, b: Tensor) -> Any:
    return live(a + b.t()) * 2, a * 2, b + 1


@case("expanded input", lambda i: (x(1, 6).expand(4, 6),))
def _(a: Tensor) -> Any:
    return live(a + 1) * 2, a


# -- mutation ---------------------------------------------------------------------------------------------------------


@case("an input is mutated", calls=8)
def _(x: Tensor) -> Tensor:
    x.add_(1)
    return live(x) * 2


@case("an input is mutated and returned", calls=8)
def _(x: Tensor) -> Any:
    return x.mul_(2), live(x + 1)


@case("an input is mutated by a live step", replayed=False)
def _(x: Tensor) -> Tensor:
    y = (x * 2).sin()
    live_in_place(x)
    return y + x


@case("an input is mutated through a view", calls=8)
def _(x: Tensor) -> Tensor:
    x[1:].t().mul_(2)
    x[0] = 7
    return live(x + 1)


@case("an input is mutated before and after a cut", calls=8)
def _(x: Tensor) -> Tensor:
    x.add_(1)
    y = live(x)
    x.add_(y)
    return live(x) + y


@case("one of two overlapping inputs is mutated", lambda i: (lambda t: (t[:3], t[1:]))(x(4, 6)), replayed=False)
def _(a: Tensor, b: Tensor) -> Any:
    a.mul_(2)
    return live(b + 1), a + b


@case("an intermediate is mutated after it crossed a cut")
def _(x: Tensor) -> Any:
    y = x + 1
    z = live(y)
    y.mul_(2)
    return y, z, live(y)


@case("a counter buffer")
class Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return live(x + self.count) * 2


@case("a buffer that is assigned anew", calls=8)
class Reassigned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("last", torch.zeros(4, 6))

    def forward(self, x: Tensor) -> Tensor:
        y = live(x + self.last) * 2
        self.last = y + 1
        return y


@case("running statistics", lambda i: (x(4, 6),))
class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        return live(self.norm(x)) + 1


@case("a cache filled by index_copy_", lambda i: (x(1, 6), torch.tensor([i])))
class Cache(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cache", torch.zeros(8, 6))

    def forward(self, new: Tensor, at: Tensor) -> Tensor:
        self.cache.index_copy_(0, at, new * 2)
        return live(self.cache) + 1


@case("a cache filled by an opaque op", lambda i: (x(2, 6), 2 * i), calls=6, replayed=False)
class OpaqueCache(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cache", torch.zeros(16, 6))

    def forward(self, new: Tensor, at: int) -> Tensor:
        append(self.cache, new * 2, at)
        return self.cache.sum(0) + 1


@case("in-place metadata of an intermediate after a cut", replayed=False)
def _(x: Tensor) -> Any:
    y = live(x + 1)
    z = live(y)
    y.unsqueeze_(0)
    return y * 2, live(z) + y


@case("a view and its base cross a cut and one is written", calls=6)
def _(x: Tensor) -> Any:
    base = live(x.sin())
    view = base.view(-1)[3:]
    other = live(base)
    base.mul_(2)
    base.t().add_(other.t())
    return view + 1, base, base.add_(1)


@case("out= writes an input", lambda i: (x(), x()))
def _(x: Tensor, out: Tensor) -> Tensor:
    torch.add(x, 1, out=out)
    return live(out) * 2


# -- views and aliases as outputs -------------------------------------------------------------------------------------


@case("an input comes back")
def _(x: Tensor) -> Any:
    return x, live(x + 1) * 2


@case("views of an input come back")
def _(x: Tensor) -> Any:
    return x[1:], x.t(), x.view(-1), live(x) + 1


@case("a view made inside a cut group comes back")
def _(x: Tensor) -> Any:
    y = live(x + 1)
    return y.t(), y[0], live(y)


@case("outputs share memory")
def _(x: Tensor) -> Any:
    y = live(x) + 1
    return y, y[1:], y.view(-1), y


@case("the same output twice")
def _(x: Tensor) -> Any:
    y = live(x) + 1
    return y, y, [y]


@case("a parameter comes back")
class ReturnsParameter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Any:
        return self.w, self.w[1:], live(x * self.w) + 1


@case("a view of a buffer comes back")
class ReturnsBufferView(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("b", torch.zeros(4, 6))

    def forward(self, x: Tensor) -> Any:
        self.b.add_(x)
        return self.b[1:], live(x + self.b) * 2


@case("a mutated view of an input comes back", calls=8)
def _(x: Tensor) -> Any:
    y = x[1:]
    y.mul_(2)
    return y, live(x) + 1


@case("non-contiguous outputs")
def _(x: Tensor) -> Any:
    return (live(x) + 1).t(), (x * 2)[::2], (x + 1).expand(3, 4, 6)


@case("only views", replayed=False)
def _(x: Tensor) -> Any:
    return x.t(), x[1:]


@case("a constant tensor comes back")
def _(x: Tensor) -> Any:
    return live(x) + 1, torch.ones(3), torch.arange(4) * 2


# -- autocast, modes --------------------------------------------------------------------------------------------------


@case("autocast inside", lambda i: (x(4, 4),))
def _(x: Tensor) -> Any:
    with torch.autocast("cpu", torch.bfloat16):
        y = live(x @ x) @ x
    return y, x @ x


@case("nested autocast", lambda i: (x(4, 4),))
def _(x: Tensor) -> Any:
    with torch.autocast("cpu", torch.bfloat16):
        y = live(x @ x)
        with torch.autocast("cpu", enabled=False):
            z = live(x @ x) @ x
        return y @ x, z


@case("no_grad inside")
def _(x: Tensor) -> Any:
    with torch.no_grad():
        y = live(x + 1)
    return y * 2


# -- control ----------------------------------------------------------------------------------------------------------


@case("a graph break in the middle")
def _(x: Tensor) -> Any:
    y = live(x + 1) * 2
    torch._dynamo.graph_break()
    return live(y) - x


@case("a branch on data")
def _(x: Tensor) -> Any:
    y = x * 2
    return live(y) + 1 if y.sum() > 1e9 else live(y) - 1


@case("a host sync inside", replayed=False)
def _(x: Tensor) -> Any:
    n = int(x.abs().sum().clamp(1, 3).item())
    return live(x[:n]) + n


@case("a size that is data", lambda i: (x(),), replayed=False)
def _(x: Tensor) -> Any:
    return x[x > 0] * 2, live(x.nonzero()) + 1


@case("vmap inside")
def _(x: Tensor) -> Any:
    return live(torch.vmap(lambda row: row * row.sum())(x) + 1) * 2


@case("a growing cache", calls=8)
class Growing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cache = torch.zeros(3, 6)

    def forward(self, x: Tensor) -> Tensor:
        self.cache = torch.cat([self.cache, x])
        return (x * 2) @ self.cache.t() @ self.cache + (x.sin() + 1)


class ViewThroughLiveStep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("b", torch.zeros(4, 6))

    def forward(self, x: Tensor) -> Any:
        y = x.sin()
        return y + self.b.sum(), live_view(self.b.view(6, 4))


def test_a_live_step_returns_a_view_of_a_view_of_a_buffer() -> None:
    assert_like_eager(ViewThroughLiveStep, lambda i: (x(),), cudagraph_mode="PIECEWISE")


class ReturnsDetachedView(ReturnsParameter):
    def forward(self, x: Tensor) -> Any:
        return self.w.detach()[1:], live(x * self.w) + 1


def test_a_detached_view_of_a_parameter_comes_back() -> None:
    assert_like_eager(ReturnsDetachedView, lambda i: (x(),))


def build(each: Case) -> Callable[[], Any]:
    return each.fn if each.module else (lambda: each.fn)


@pytest.mark.parametrize("name", CASES)
def test_like_eager(name: str) -> None:
    each = CASES[name]
    assert_like_eager(build(each), each.inputs, **each.options)


#: A third of the cases, those where Inductor could change what eager shows.
THROUGH_INDUCTOR = (
    "attention with views around it",
    "twins",
    "ints floats bools and strings out",
    "an int that changes",
    "dataclass in and out",
    "non-contiguous input",
    "an input is mutated and returned",
    "an input is mutated before and after a cut",
    "one of two overlapping inputs is mutated",
    "a counter buffer",
    "running statistics",
    "a cache filled by an opaque op",
    "in-place metadata of an intermediate after a cut",
    "a view and its base cross a cut and one is written",
    "views of an input come back",
    "outputs share memory",
    "a view of a buffer comes back",
    "non-contiguous outputs",
    "autocast inside",
    "vmap inside",
    "a growing cache",
)


@pytest.mark.slow
@pytest.mark.parametrize("name", THROUGH_INDUCTOR)
def test_like_eager_through_inductor(name: str) -> None:
    each = CASES[name]
    tolerance = 2e-2 if "autocast" in name else None
    assert_like_eager(build(each), each.inputs, compiler="inductor", tolerance=tolerance, **each.options)


# -- sizes ------------------------------------------------------------------------------------------------------------


def batches(*sizes: int, mark: bool = True) -> Callable[[int], Any]:
    def make(call: int) -> tuple[Tensor]:
        tensor = torch.randn(sizes[call], 6)
        if mark and sizes[call] > 1:
            mark_dynamic(tensor, 0)
        return (tensor,)

    return make


def two_cuts(x: Tensor) -> Tensor:
    return live(live(x.sin() + 1) * 2) + x


def test_symbolic_batch_sizes() -> None:
    sizes = (4, 7, 4, 7, 4, 7, 9)
    (only,) = assert_like_eager(lambda: two_cuts, batches(*sizes), calls=len(sizes))
    (runner,) = only.runners
    assert sorted(plan.key for plan in runner.stats.plans) == [(4,), (7,)] or len(runner.stats.plans) == 2


def test_automatic_dynamic_batch_sizes() -> None:
    sizes = (4, 7, 9, 7, 9, 7, 9)
    regions = assert_like_eager(lambda: two_cuts, batches(*sizes, mark=False), calls=len(sizes))
    assert len(regions) == 2


@pytest.mark.parametrize("dynamic", [True, False])
def test_the_dynamic_argument_of_torch_compile(dynamic: bool) -> None:
    sizes = (4, 7, 4, 7, 4, 7)
    regions = assert_like_eager(lambda: two_cuts, batches(*sizes, mark=False), calls=len(sizes), dynamic=dynamic)
    assert len(regions) == (1 if dynamic else 2)


def test_zero_and_one_rows() -> None:
    sizes = (4, 1, 0, 4, 1, 0, 4, 1, 0)
    assert_like_eager(lambda: two_cuts, batches(*sizes, mark=False), calls=len(sizes))


def test_fullgraph() -> None:
    assert_like_eager(lambda: two_cuts, lambda i: (x(),), fullgraph=True)


def test_recompile_for_another_dtype_rank_and_back() -> None:
    shapes: list[Callable[[], Tensor]] = [lambda: x(4, 6), lambda: x(4, 6).double(), lambda: x(2, 4, 6)]
    assert_like_eager(lambda: two_cuts, lambda i: (shapes[i % 3](),), calls=12)


# -- the law -----------------------------------------------------------------------------------------------------------


@given(operations=OPERATIONS, cuts=st.sets(st.integers(0, 20)))
@hypothesis_settings(max_examples=20)
def test_random_programs_are_like_eager(operations: list[Operation], cuts: set[int]) -> None:
    """Cut anywhere and run the cuts live: warm-up, capture and replay show what eager shows."""

    def cut(node: torch.fx.Node) -> bool:
        return list(node.graph.nodes).index(node) in cuts

    assert_like_eager(
        lambda: random_program(operations),
        lambda i: (x(4, 4), x(4, 4)),
        calls=5,
        replayed=False,
        splitting_rules=(cut,),
        cudagraph_mode="PIECEWISE",
    )


class Scaled(nn.Module):
    """Dynamo traces its float as a symbol when everything is to be dynamic."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = 0.25
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.linear(x) * self.scale).relu()


def test_a_float_that_inductor_wants_constant_has_dynamo_trace_again() -> None:
    model = Scaled()
    compiled = torch.compile(model, backend="graphcap", dynamic=True, options={"simulate": True, "capture_after": 2})
    with torch.no_grad():
        for _ in range(4):
            x = torch.randn(3, 4)
            assert torch.allclose(compiled(x), model(x), atol=1e-6)
    (region,) = graphcap.explain(compiled).regions
    assert not region.bypass
    assert {piece.origin for piece in region.pieces} <= {"compiled", "loaded"}
    assert [plan.replays for plan in region.plans] == [2]
