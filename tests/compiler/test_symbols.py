"""Which sizes are part of the graph key."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo import mark_dynamic
from torch._dynamo.decorators import mark_unbacked

from graphcap.compiler.backend import graphcap
from graphcap.compiler.region import all_regions, forget_regions
from graphcap.compiler.rules import op_name
from graphcap.compiler.symbols import SizeSymbols, analyse_sizes
from tests.compiler.graphs import call_nodes, groups_of, in_backend, kinds, trace


def dynamic(tensor: Tensor, *dims: int) -> Tensor:
    for dim in dims:
        mark_dynamic(tensor, dim)
    return tensor


def sizes_of(fn: Any, *inputs: Any, **options: Any) -> SizeSymbols:
    (sizes,) = in_backend(lambda gm, _: analyse_sizes(gm.graph), fn, *inputs, **options)
    assert isinstance(sizes, SizeSymbols)
    return sizes


def attend_with_cache(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """One decode step: ``q, k [batch, 1, 8]``, ``v [batch, kv, 8]`` is the cache that grows by ``k``."""
    cache = torch.cat([v, k], dim=1)
    out = F.scaled_dot_product_attention(q * 2, cache, cache)
    return out + 1, cache


def test_static_graph_has_an_empty_key() -> None:
    sizes = sizes_of(lambda x: x + 1, torch.randn(3, 4))
    assert sizes.key == frozenset()
    assert sizes.live == {}


def test_a_batch_is_in_the_key_and_bound_by_its_input() -> None:
    sizes = sizes_of(lambda x: x + 1, dynamic(torch.randn(3, 4), 0))
    (symbol,) = sizes.key
    assert sizes.bound_by[symbol].op == "placeholder"


def test_one_symbol_for_inputs_that_share_a_size() -> None:
    sizes = sizes_of(lambda x, y: x + y, dynamic(torch.randn(3, 4), 0), dynamic(torch.randn(3, 4), 0))
    assert len(sizes.key) == 1


def test_a_cache_that_grows_by_cat_is_outside_the_key() -> None:
    q, k = dynamic(torch.randn(2, 1, 8), 0), dynamic(torch.randn(2, 1, 8), 0)
    sizes = sizes_of(attend_with_cache, q, k, dynamic(torch.randn(2, 5, 8), 0, 1))
    assert len(sizes.key) == 1
    ((_, reason),) = sizes.live.items()
    assert reason.startswith("v dim 1 grows with every call")


def test_only_what_touches_the_growing_size_runs_live() -> None:
    q, k = dynamic(torch.randn(2, 1, 8), 0), dynamic(torch.randn(2, 1, 8), 0)
    gm = trace(attend_with_cache, q, k, dynamic(torch.randn(2, 5, 8), 0, 1))
    groups = groups_of(gm)
    live = [op_name(node.target) for group in groups if group.verdict.kind == "eager" for node in group.nodes]
    assert live == ["torch._VariableFunctionsClass.cat", "aten::scaled_dot_product_attention"]


class Seen:
    """How many rows there were."""

    rows = 0


def test_a_number_that_the_graph_makes_larger_is_outside_the_key() -> None:
    found: list[SizeSymbols] = []
    seen = Seen()

    def counting(x: Tensor) -> Tensor:
        seen.rows += x.shape[0]
        return x * 2 + seen.rows

    def look(gm: Any, inputs: Any) -> Any:
        found.append(analyse_sizes(gm.graph))
        return gm.forward

    torch._dynamo.reset()
    run = torch.compile(counting, backend=look)
    for _ in range(3):
        run(torch.randn(3, 4))
    assert seen.rows == 9
    ((_, reason),) = found[-1].live.items()
    assert "rows grows with every call" in reason
    assert found[-1].key == frozenset()


def test_a_size_that_is_returned_as_a_larger_number_is_in_the_key() -> None:
    """The next call has the same batch."""
    sizes = sizes_of(lambda x: (x * 2, x.shape[0] + 1), dynamic(torch.randn(3, 4), 0))
    assert len(sizes.key) == 1
    assert sizes.live == {}


def attend_with_mask(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """As above, with a ``mask [batch, kv + 1]`` that the caller makes longer for every call."""
    cache = torch.cat([v, k], dim=1)
    visible = mask[:, torch.arange(cache.shape[1])]  # by index, so that no guard relates the two lengths
    out = F.scaled_dot_product_attention(q * 2, cache, cache, attn_mask=visible[:, None, :])
    return out + 1, cache


def test_a_mask_that_keeps_pace_with_a_cache_is_outside_the_key() -> None:
    q, k = torch.randn(2, 1, 8), torch.randn(2, 1, 8)
    mask = dynamic(torch.ones(2, 6, dtype=torch.bool), 1)
    sizes = sizes_of(attend_with_mask, q, k, dynamic(torch.randn(2, 5, 8), 1), mask)
    assert sizes.key == frozenset()
    assert "mask dim 1 is as long as a cache that grows with every call" in sizes.live.values()


def test_a_batch_as_long_as_the_cache_stays_in_the_key() -> None:
    q, k = dynamic(torch.randn(6, 1, 8), 0), dynamic(torch.randn(6, 1, 8), 0)
    sizes = sizes_of(attend_with_cache, q, k, dynamic(torch.randn(6, 5, 8), 0, 1))
    assert len(sizes.key) == 1
    assert len(sizes.live) == 1


def test_a_cache_that_grows_by_an_unbacked_number_of_tokens_is_outside_the_key() -> None:
    k = torch.randn(2, 3, 8)
    mark_unbacked(k, 1)
    sizes = sizes_of(lambda v, k: torch.cat([v, k], dim=1), dynamic(torch.randn(2, 5, 8), 1), k)
    assert len(sizes.key) == 1
    assert len(sizes.live) == 1


def test_a_batch_that_is_doubled_stays_in_the_key() -> None:
    """Classifier-free guidance: the output is longer, but the caller does not feed it back."""
    sizes = sizes_of(lambda x: torch.cat([x, x]), dynamic(torch.randn(3, 4), 0))
    assert len(sizes.key) == 1
    assert sizes.live == {}


def test_a_float_that_changes_is_outside_the_key() -> None:
    def scale(x: Tensor, by: float) -> Tensor:
        return x * by

    sizes = sizes_of(scale, torch.randn(3), 0.5, dynamic=True)
    assert list(sizes.live.values()) in ([], ["a float that changes between calls"])
    torch._dynamo.reset()
    seen: list[SizeSymbols] = []

    def backend(gm: torch.fx.GraphModule, _inputs: Any) -> Any:
        seen.append(analyse_sizes(gm.graph))
        return gm.forward

    compiled = torch.compile(scale, backend=backend)
    for by in (0.5, 0.25, 0.125):
        compiled(torch.ones(3), by)
    assert len(seen) == 2
    # Dynamo hands a float that changed over as a symbol, or as a tensor that is an ordinary input.
    assert list(seen[-1].live.values()) in ([], ["a float that changes between calls"])


def test_an_int_that_changes_is_in_the_key() -> None:
    sizes = sizes_of(lambda x, n: x * n, torch.randn(3), 7, dynamic=True)
    assert len(sizes.key) >= 1
    assert sizes.live == {}


def test_an_unbacked_batch_is_in_the_key_and_its_checks_cut_nothing() -> None:
    x = torch.randn(3, 4)
    mark_unbacked(x, 0)
    gm = trace(lambda x: (x * 2).relu(), x)
    assert len(analyse_sizes(gm.graph).key) == 1
    assert kinds(groups_of(gm)) == ["captured"]


def test_a_size_that_is_data_runs_live_from_where_it_appears() -> None:
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        gm = trace(lambda x: (x[x > 0] * 2, x + 1), torch.randn(8))
    sizes = analyse_sizes(gm.graph)
    (doubled,) = call_nodes(gm, "mul")
    assert "known only after other operations ran" in (sizes.outside_key(doubled) or "")
    (plus,) = call_nodes(gm, "add")
    assert sizes.outside_key(plus) is None


def test_a_slice_that_moves_along_a_larger_tensor_is_one_shape() -> None:
    """Where a tensor begins is no size: ``tokens[:, n : n + 1]`` replays one plan for every ``n``."""
    tokens = torch.arange(48.0).reshape(4, 12)
    torch._dynamo.reset()
    forget_regions()
    fast = torch.compile(_double_and_view, backend=graphcap, options={"compiler": "eager", "simulate": True})
    with torch.no_grad():
        for n in range(10):
            column = tokens[:, n : n + 1]
            doubled, view = fast(column)
            assert torch.equal(doubled, column * 2)
            assert view.data_ptr() == column.data_ptr()
    last = all_regions()[-1]
    assert last.key_sizes == {}
    assert [runner.stats.replays for runner in last.runners] == [7]


def _double_and_view(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x * 2, x.view(-1)
