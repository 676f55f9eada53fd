"""One step of a program whose function is another one at each size, as a recording holds for one size."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from graphcap.compiler.breakable.calls import Outcome
from graphcap.cudagraph.dispatch.step import current
from graphcap.cudagraph.hardware.generators import set_generator_states
from graphcap.cudagraph.padded.corner import corner

#: The sizes of a call: one number for each symbol.
At = tuple[int, ...]


class NotRecorded(LookupError):
    """There is no recording for these sizes. Nothing has run."""

    def __init__(self, at: At) -> None:
        super().__init__(f"nothing was recorded at the sizes {at}")
        self.at = at


class SizedStep:
    """Takes the sizes, then the values that it reads; returns the new ones.

    Attributes:
        functions: by size; each takes the values alone.
    """

    def __init__(self, num_sizes: int) -> None:
        self.functions: dict[At, Callable[..., Any]] = {}
        self._num_sizes = num_sizes

    def __call__(self, *given: Any) -> Any:
        """Run the function of a size.

        Raises:
            NotRecorded: there is none.
        """
        at = given[: self._num_sizes]
        function = self.functions.get(at)
        if function is None:
            raise NotRecorded(at)
        return function(*given[self._num_sizes :])


class _Repeat(threading.local):
    outcome: Outcome | None = None


@dataclass(slots=True)
class LiveCall:
    """A call that runs live in every replay, at one size. In a comparison it repeats what it did at another one.

    Attributes:
        run: takes the read values, returns the new ones.
        reads: their numbers.
        made: the layout of each new one.
        repeats: shared with the other sizes.
    """

    run: Callable[..., Any]
    reads: Sequence[int]
    made: Sequence[tuple[Any, ...]]
    repeats: _Repeat

    def __call__(self, *given: Any) -> Any:
        """Run it, or do what it did."""
        outcome = self.repeats.outcome
        if outcome is None:
            return self.run(*given)
        self.repeats.outcome = None
        if (said := current()) is not None:
            for name in outcome.asked:
                said.inputs.get(name)  # a warm-up sees which inputs a plan has to bring
        for position, tensor in outcome.written.items():
            corner(given[position], tensor.shape).copy_(tensor)
        set_generator_states(outcome.generators)
        return [_laid_out(tensor, *layout[:2]) for tensor, layout in zip(outcome.results, self.made, strict=True)]


class LiveStep(SizedStep):
    """A :class:`SizedStep` whose functions are :class:`LiveCall`."""

    def __init__(self, num_sizes: int) -> None:
        super().__init__(num_sizes)
        self._repeats = _Repeat()

    def add(self, at: At, run: Callable[..., Any], reads: Sequence[int], made: Sequence[tuple[Any, ...]]) -> None:
        """The function for a size; see :class:`LiveCall`."""
        self.functions[at] = LiveCall(run, tuple(reads), made, self._repeats)

    def repeat(self, outcome: Outcome | None) -> None:
        """Do not run at the next call in this thread, but do what an earlier run did; ``None`` takes that back."""
        self._repeats.outcome = outcome


def _laid_out(tensor: torch.Tensor, size: torch.Size, stride: tuple[int, ...]) -> torch.Tensor:
    """A result in the leading corner of a larger one; the result itself where it has that size."""
    if tensor.shape == size:
        return tensor
    larger = torch.empty_strided(size, stride, dtype=tensor.dtype, device=tensor.device).zero_()
    corner(larger, tensor.shape).copy_(tensor)
    return larger
