"""``assert_like_eager``: a compiled function may not differ from eager in anything that its caller can see."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from graphcap.compiler import region
from graphcap.compiler.backend import graphcap
from graphcap.compiler.region import Region

#: ``make_inputs(call)`` returns the arguments of that call, as a tuple or as ``Arguments``.
Inputs = Callable[[int], Any]


@dataclass
class Arguments:
    """Positional and keyword arguments of one call."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] | None = None


@dataclass
class Seen:
    """What a caller sees of one call: every leaf of the result, then of the arguments, then of the module's state."""

    spec: Any
    num_results: int
    leaves: list[Any]
    copies: list[Any]

    def own_results(self) -> list[tuple[Tensor, Tensor]]:
        """Each returned tensor with its value at that time, but those in memory that the caller may rightly change."""
        kept = {_memory(leaf) for leaf in self.leaves[self.num_results :] if isinstance(leaf, Tensor)}
        results = zip(self.leaves[: self.num_results], self.copies, strict=False)
        return [(leaf, copy) for leaf, copy in results if isinstance(leaf, Tensor) and _memory(leaf) not in kept]


def assert_like_eager(
    make_model: Callable[[], Callable[..., Any]],
    make_inputs: Inputs,
    *,
    calls: int = 4,
    replayed: bool = True,
    dynamic: bool | None = None,
    fullgraph: bool = False,
    tolerance: float | None = None,
    grad_mode: Callable[[int], Any] = lambda call: torch.no_grad(),
    **options: Any,
) -> list[Region]:
    """Run a fresh model eager and a fresh one compiled over the same calls, and compare everything visible after each.

    Compared are the structure of the result, values (bitwise with ``compiler="eager"``), dtypes, strides, which leaves
    share memory and at which offset, which are the same object, and state: arguments, parameters, buffers. What earlier
    calls returned is compared again at the end, where outputs are clones: no later call may have written into it.

    Args:
        make_model: called twice, under one seed.
        make_inputs: called per call and side, under one seed per call.
        calls: how many; by default enough for a warm-up, a capture and two replays.
        replayed: demand that at least one call was served by a plan, and that no capture failed.
        dynamic, fullgraph: for ``torch.compile``.
        tolerance: absolute and relative; by default none for ``compiler="eager"`` and 1e-5 otherwise.
        grad_mode: the context of each call.
        options: for the backend; ``compiler="eager"`` and ``simulate=True`` unless given.

    Returns:
        The regions of the compiled side, for further questions.
    """
    options = {"compiler": "eager", "simulate": True, "capture_after": 2, **options}
    tolerance = tolerance if tolerance is not None else (0.0 if options["compiler"] == "eager" else 1e-5)
    torch._dynamo.reset()
    region.forget_regions()
    expected_model, got_model = _seeded(make_model, 0), _seeded(make_model, 0)
    compiled = torch.compile(got_model, backend=graphcap, dynamic=dynamic, fullgraph=fullgraph, options=options)
    everything = []
    for call in range(calls):
        with grad_mode(call):
            expected = observe(expected_model, expected_model, make_inputs, call)
            got = observe(compiled, got_model, make_inputs, call)
        compare(got, expected, tolerance, f"call {call}")
        everything.append(got)
    for call, got in enumerate(everything if options.get("outputs", "clone") == "clone" else ()):
        for leaf, copy in got.own_results():
            torch.testing.assert_close(
                leaf, copy, rtol=0, atol=0, equal_nan=True, msg=f"call {call}: overwritten later"
            )
    regions = region.all_regions()
    assert regions, "graphcap was never called"
    replays = sum(runner.stats.replays for each in regions for runner in each.runners)
    reasons = [str(runner.stats.live_calls) + str(runner.stats.failures) for each in regions for runner in each.runners]
    assert not replayed or replays > 0, f"no call was replayed: {reasons or [each.no_capture for each in regions]}"
    assert not replayed or not any(runner.stats.failures for each in regions for runner in each.runners), reasons
    assert not any("graphcap failed" in each.bypass for each in regions), [each.bypass for each in regions]
    return regions


def _seeded(make: Callable[..., Any], seed: int, *args: Any) -> Any:
    torch.manual_seed(seed)
    return make(*args)


def observe(run: Callable[..., Any], model: Any, make_inputs: Inputs, call: int) -> Seen:
    """Call once and look at everything. Results come first among the leaves, then arguments, then state."""
    given = _seeded(make_inputs, call, call)
    given = given if isinstance(given, Arguments) else Arguments(tuple(given))
    result = run(*given.args, **(given.kwargs or {}))
    state = [*model.parameters(), *model.buffers()] if isinstance(model, nn.Module) else []
    leaves, spec = pytree.tree_flatten((result, given.args, dict(given.kwargs or {}), state))
    num_results = len(pytree.tree_leaves(result))
    return Seen(
        spec, num_results, leaves, [leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    )


def compare(got: Seen, expected: Seen, tolerance: float, where: str) -> None:
    """Assert that two calls look the same from outside."""
    assert got.spec == expected.spec, f"{where}: structure"
    for index, (a, b) in enumerate(zip(got.copies, expected.copies, strict=True)):
        name = f"{where}, leaf {index}"
        assert type(got.leaves[index]) is type(expected.leaves[index]), name
        if not isinstance(b, Tensor):
            assert a == b, name
            continue
        torch.testing.assert_close(
            a, b, rtol=tolerance, atol=tolerance, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )
        here, there = got.leaves[index], expected.leaves[index]
        assert here.stride() == there.stride(), f"{name}: strides {here.stride()} against {there.stride()}"
        assert here.requires_grad == there.requires_grad, f"{name}: requires_grad"
    assert _first(got, id) == _first(expected, id), f"{where}: which leaves are one object"
    assert _first(got, _memory) == _first(expected, _memory), f"{where}: which leaves share memory"
    assert _offsets(got) == _offsets(expected), f"{where}: offsets into shared memory"


def _memory(leaf: Any) -> Any:
    return leaf.untyped_storage()._cdata


def _first(seen: Seen, identity: Callable[[Any], Any]) -> list[int]:
    """For every tensor leaf the index of the first with the same identity."""
    identities = [identity(leaf) if isinstance(leaf, Tensor) else index for index, leaf in enumerate(seen.leaves)]
    return [identities.index(each) for each in identities]


def _offsets(seen: Seen) -> list[int]:
    """For every tensor leaf its distance in bytes from the first leaf in the same memory."""
    first = _first(seen, _memory)
    return [
        leaf.data_ptr() - seen.leaves[first[index]].data_ptr() if isinstance(leaf, Tensor) else 0
        for index, leaf in enumerate(seen.leaves)
    ]
