"""Which rungs a ladder should have, from the sizes that were seen: an exact dynamic programme.

With sizes ``s_1 < ... < s_m`` a ladder cuts them into runs, each served by a rung. Rungs are chosen among the sizes
seen: lowering one to the largest size that it serves never costs more, as long as a live call is not cheaper than the
most padding that is allowed. ``D[k][j]``, the least cost of the sizes up to ``s_j`` with ``k`` rungs and ``s_j`` the
top one, is the minimum over ``i < j`` of ``D[k-1][i]`` plus the cost of serving ``s_i+1 .. s_j`` by ``s_j``. Sums
over prefixes give that cost at once, so that the whole takes ``k * m * m / 2`` additions. What lies above the top
rung, or would be padded by more than is allowed, runs live.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from graphcap.cudagraph.dispatch.ladder import Ladder
from graphcap.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Demand:
    """How often one size of one dim was asked for.

    Attributes:
        size: the size of the dim.
        calls: how many calls had it.
        rows: the tokens that one more of this size would cost them all: the number of calls, or where dims multiply to
            tokens the product of the others, added up over the calls.
    """

    size: int
    calls: int
    rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Prices:
    """What things cost, all in one unit of your choice; the defaults count padded tokens and nothing else.

    Attributes:
        token: computing one token of padding.
        live: running one call without a graph. Infinite: every size must be covered.
        plan: having one more plan: its share of the capture time and memory, over the calls in the histogram.
    """

    token: float = 1.0
    live: float = math.inf
    plan: float = 0.0


@dataclass(frozen=True, slots=True)
class Suggestion:
    """A ladder, and what it would have cost on the traffic that it was made from.

    Attributes:
        sizes: ascending; a value for ``capture_sizes``.
        padded_tokens: tokens of padding.
        padding_waste: the part of all tokens in replays that is padding, 0 to below 1.
        live_calls: calls that no rung serves.
        cost: the whole, in the unit of the prices.
    """

    sizes: tuple[int, ...]
    padded_tokens: int
    padding_waste: float
    live_calls: int
    cost: float


def best_rungs(demands: Sequence[Demand], max_plans: int, max_padding_ratio: float, prices: Prices) -> Suggestion:
    """The ladder of at most ``max_plans`` rungs that costs least on this demand; of equal ones one with fewest rungs.

    Args:
        demands: one entry per size, in any order. A size with no calls must be covered where ``prices.live`` is
            infinite, and counts for nothing otherwise.
        max_plans: the most rungs; at least 0.
        max_padding_ratio: the largest ``(rung - n) / rung`` that a rung serves, in ``[0, 1)``.
        prices: what things cost.

    Raises:
        ConfigError: ``prices.live`` is infinite and ``max_plans`` rungs cannot cover every size; the message says how
            many it takes.
    """
    demands = sorted(demands, key=lambda each: each.size)
    if math.isinf(prices.live):
        needed = _fewest([each.size for each in demands], max_padding_ratio)
        if needed > max_plans:
            raise ConfigError(
                f"{max_plans} plans cannot cover all {len(demands)} sizes with max_padding_ratio="
                f"{max_padding_ratio:g}: it takes {needed}. Raise one of the two, or say what a live call costs"
            )
    return _priced(demands, _solve(demands, max_plans, max_padding_ratio, prices), max_padding_ratio, prices)


def _fewest(sizes: Sequence[int], max_padding_ratio: float) -> int:
    """The fewest rungs that cover ascending sizes: from the top, each rung takes all that it may."""
    count, left = 0, len(sizes)
    while left:
        left = _out_of_reach(sizes, left - 1, max_padding_ratio)
        count += 1
    return count


def _out_of_reach(sizes: Sequence[int], at: int, max_padding_ratio: float) -> int:
    """How many of the ascending sizes are too small for the rung ``sizes[at]`` to serve them."""
    rung = sizes[at]
    return bisect_left(range(at), True, key=lambda i: (rung - sizes[i]) / rung <= max_padding_ratio)


def _solve(demands: Sequence[Demand], max_plans: int, max_padding_ratio: float, prices: Prices) -> list[int]:
    """The sizes of the best ladder, ascending."""
    runs = _Runs(demands, max_padding_ratio, prices)
    count, most = len(demands), min(max_plans, len(demands))
    costs = torch.full((most + 1, count + 1), math.inf, dtype=torch.float64)  # index 0: no rung, no size
    costs[0, 0] = 0.0
    before = torch.zeros((most + 1, count + 1), dtype=torch.int64)
    for top in range(1, count + 1):
        costs[1:, top], before[1:, top] = (costs[:-1, :top] + runs.costs(top)).min(dim=1)
    totals = costs + runs.live_above() + torch.arange(most + 1)[:, None] * prices.plan
    used, top = divmod(int(totals.argmin()), count + 1)  # of equal ones the first, which has the fewest rungs
    rungs = []
    while used:
        rungs.append(demands[top - 1].size)
        used, top = used - 1, int(before[used, top])
    return rungs[::-1]


class _Runs:
    """What it costs to serve a run of sizes by its last one. Index 0 is before all sizes, index j the j-th size."""

    def __init__(self, demands: Sequence[Demand], max_padding_ratio: float, prices: Prices) -> None:
        sizes = [each.size for each in demands]
        self._sizes = sizes
        self._rows = _running([each.rows for each in demands])
        self._tokens = _running([each.rows * each.size for each in demands])
        self._calls = _running([each.calls for each in demands])
        self._prices = prices
        self._out_of_reach = [_out_of_reach(sizes, at, max_padding_ratio) for at in range(len(sizes))]

    def costs(self, top: int) -> Tensor:
        """``[top]``: entry i is the cost of the sizes after index i up to ``top``, which is their rung."""
        after, last = torch.arange(top), self._out_of_reach[top - 1]
        first = after.clamp(min=last)  # the rung serves what comes after this index
        rows, tokens = self._rows[top] - self._rows[first], self._tokens[top] - self._tokens[first]
        padding = self._sizes[top - 1] * rows - tokens
        return padding * self._prices.token + self._live(self._calls[first] - self._calls[:top], after < last)

    def live_above(self) -> Tensor:
        """``[num_sizes + 1]``: the cost of running all that is above an index live."""
        return self._live(self._calls[-1] - self._calls, torch.arange(len(self._calls)) < len(self._sizes))

    def _live(self, calls: Tensor, any_size: Tensor) -> Tensor:
        if math.isinf(self._prices.live):  # each size must be covered, one without calls too
            return torch.zeros_like(calls).masked_fill(any_size, math.inf)
        return calls * self._prices.live


def _running(values: Sequence[int]) -> Tensor:
    """``[len(values) + 1]``: the sums of the first so many values."""
    return torch.tensor([0, *values], dtype=torch.float64).cumsum(0)


def _priced(demands: Sequence[Demand], rungs: list[int], max_padding_ratio: float, prices: Prices) -> Suggestion:
    """What these rungs cost, by looking up each size as a call would."""
    ladder = Ladder(rungs, max_padding_ratio)
    padded = tokens = live = 0
    for each in demands:
        rung = ladder.rung_of(each.size)
        if rung is None:
            live += each.calls
        else:
            padded += (rung - each.size) * each.rows
            tokens += rung * each.rows
    cost = padded * prices.token + len(rungs) * prices.plan + (live * prices.live if live else 0.0)
    return Suggestion(ladder.sizes, padded, padded / tokens if tokens else 0.0, live, cost)
