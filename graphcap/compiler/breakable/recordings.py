"""What has been recorded of the calls of one entry: two that agree make a program, further sizes are added to it.

A recording that the function could not repeat (it made something on its first call, it counted its calls) is thrown
away. Calls of one size must agree in everything, calls of two sizes in all but the sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from graphcap.compiler.breakable.agree import difference
from graphcap.compiler.breakable.calls import Kind
from graphcap.compiler.breakable.incoming import Incoming
from graphcap.compiler.breakable.look import Look, Viewpoint
from graphcap.compiler.breakable.output_sizes import Sample
from graphcap.compiler.breakable.outside import Outside, find_outside
from graphcap.compiler.breakable.program import Built, build
from graphcap.compiler.breakable.result import Result
from graphcap.compiler.breakable.sized import At
from graphcap.compiler.breakable.sizes import SizedLayout
from graphcap.compiler.breakable.steps import StepsAt, Surroundings, steps_of
from graphcap.compiler.breakable.value_bounds import value_bounds
from graphcap.compiler.breakable.watch import Watch
from graphcap.compiler.breakable.write_indices import write_indices
from graphcap.cudagraph import InputKind, InputSpec, Size

MAX_RECORDINGS = 4  #: calls after which a function that differs from call to call is left alone
_ENOUGH = 3  #: sizes of one symbol at which the sizes of results are remembered


class Recordings:
    """See the module.

    Attributes:
        built: the program, ``None`` until two calls agree.
        num_built: how many programs there were.
        refusal: why such calls can never be repeated, ``""`` where they may.
        result: how to make a call's result from the outputs of the program.
        outside: where the tensors from outside were found.
        watch: whether what the program relies on is still there, and where the tensors from outside are now.
        reference: the look that the program is made from.
        odd: the sizes at which there is none, each with the reason.
        alike: the sizes at which nothing but sizes differs from the look that the program is made from.
        samples: the sizes of results.
    """

    def __init__(self, name: str, largest: Mapping[str, int], serve: Callable[..., Any], viewpoint: Viewpoint) -> None:
        """Nothing is recorded; see :func:`~graphcap.compiler.breakable.program.build`."""
        self.built: Built | None = None
        self.num_built = 0
        self.refusal = ""
        self.watch = Watch(viewpoint.roots, (), viewpoint.facts())
        self._viewpoint = viewpoint
        self.result = Result([], None)
        self.outside = Outside([], [])
        self.reference: Look | None = None
        self.odd: dict[At, str] = {}
        self.alike: set[At] = set()
        self.samples: list[Sample] = []
        self._name, self._largest, self._serve = name, largest, serve
        self._latest: dict[At, Look] = {}
        self._disagreed: dict[At, int] = {}
        self._specs: list[InputSpec] = []
        self._around: Surroundings | None = None

    @property
    def seen(self) -> list[At]:
        """The sizes of calls that no other one has agreed with yet."""
        return list(self._latest)

    def agreement(self, look: Look, at: At) -> str:
        """Why a look stands alone, ``""`` where an earlier one agrees with it."""
        if look.unsettled:
            self._latest.pop(at, None)
            return look.unsettled
        why = "there was one call"
        earlier = [*self._latest.items(), *([(None, self.reference)] if self.reference is not None else [])]
        self._latest[at] = look
        for size, other in sorted(earlier, key=lambda each: each[0] != at):  # of the same size first
            differs = difference(other.recording, look.recording, same_size=size == at)
            differs = differs or other.made.difference(look.made)
            if not differs:
                if self.built is not None:
                    del self._latest[at]
                return ""
            why = differs if size == at or why == "there was one call" else why
        return why

    def first(self, look: Look, call: Incoming, around: Surroundings) -> None:
        """Make the program from a look that agrees with an earlier one."""
        assert self.built is None
        arguments, names, viewpoint = call.arguments, call.names(), self._viewpoint
        found = find_outside(look.recording, viewpoint.roots(), arguments.tensors)
        self.watch = Watch(viewpoint.roots, found.tensors, viewpoint.facts())
        self.outside = found.without_values()
        tensors = arguments.tensor_names(names)
        held = self.outside.names(arguments, names, viewpoint.num_own_roots)
        indices, bounds = write_indices(look.recording), value_bounds(look.recording)
        self._specs = [
            *(
                _spec(name, layout, arguments.sizes.dims.get(id(tensor), {}), number in indices, bounds.get(number))
                for number, (name, layout, tensor) in enumerate(
                    zip(tensors, arguments.layouts(), arguments.tensors, strict=True)
                )
            ),
            *(
                InputSpec(symbol, InputKind.SCALAR, symbol, in_key=True, sizes=(Size(symbol),))
                for symbol in arguments.sizes.values
            ),
            *(InputSpec(name, InputKind.STATIC) for name in held),
        ]
        self._around, self.reference, self.result = around, look, look.made
        self.alike.add(call.at)
        steps = self._steps(look, arguments.sizes.values)
        assert isinstance(steps, StepsAt)
        self._build([steps], [steps.sample])
        self._latest.pop(call.at, None)
        for at, other in list(self._latest.items()):
            if not difference(look.recording, other.recording, same_size=False):
                del self._latest[at]
                self.add(other, dict(zip(arguments.sizes.values, at, strict=True)))

    def add(self, look: Look, values: Mapping[str, int]) -> None:
        """Have calls of another size run what was recorded there: a look that agrees with an earlier one."""
        assert self.built is not None
        at = tuple(values.values())
        steps = self._steps(look, values)
        why = steps if isinstance(steps, str) else self.built.why_not(steps) or self.result.difference(look.made)
        if isinstance(steps, str) or why:
            self.odd[at] = why
            return
        self.built.add(steps)
        if self.reference is not None and not difference(self.reference.recording, look.recording, same_size=False):
            self.alike.add(at)
        self.sample(steps.sample)

    def sample(self, sample: Sample) -> None:
        """Take the sizes of a call's results into account. Where they are not those that the program says, there is
        another program from now on."""
        assert self.built is not None
        ranks = [[len(size) for size in each.outputs] for each in (sample, self.samples[0])]
        if ranks[0] != ranks[1]:
            self.odd[tuple(sample.values.values())] = "other results than at other sizes"
            return
        seen = {symbol: {each.values[symbol] for each in self.samples} for symbol in sample.values}
        few = [symbol for symbol, values in seen.items() if len(values) < _ENOUGH]
        is_contradicted = self.built.is_contradicted(sample)
        if is_contradicted or any(sample.values[symbol] not in seen[symbol] for symbol in few):
            self.samples.append(sample)
        if is_contradicted:
            self._build(list(self.built.at.values()), self.samples)

    def inputs(self, call: Incoming) -> list[Any]:
        """Of the program, for a call."""
        return [*call.arguments.tensors, *call.at, *call.outside]

    def disagreed(self, at: At, why: str) -> None:
        """A look at a size stood alone; after some of them nothing is recorded there."""
        self._disagreed[at] = self._disagreed.get(at, 0) + 1
        if self._disagreed[at] >= MAX_RECORDINGS:
            self.odd[at] = why

    def _build(self, recorded: list[StepsAt], samples: list[Sample]) -> None:
        self.samples, self.num_built = samples, self.num_built + 1
        self.built = build(self._name, self._specs, recorded, samples, self._largest, self._serve)

    def _steps(self, look: Look, values: Mapping[str, int]) -> StepsAt | str:
        """The functions of a look, or why it is not like the others."""
        assert self._around is not None
        outside = self.watch.tensors
        where = {id(tensor): number for number, tensor in enumerate(outside)}
        first = len(self._specs) - len(outside)
        slots: dict[int, int] = {}
        for number, value in enumerate(look.recording.values):
            if value.kind is Kind.ARGUMENT:
                slots[number] = number
            elif value.kind is Kind.OUTSIDE:
                if id(value.tensor()) not in where:
                    return f"the tensor used at {value.origin} is not one that calls of other sizes use"
                slots[number] = first + where[id(value.tensor())]
        at = "x".join(map(str, values.values()))
        name = f"{self._name} {at}".strip()
        return steps_of(name, look.recording, values, slots, len(self._specs), self._around)


def _spec(
    name: str, layout: SizedLayout, dims: Mapping[int, Size], is_write_index: bool, value_bound: int | None
) -> InputSpec:
    return InputSpec(
        name,
        InputKind.TENSOR,
        sizes=layout.sizes,
        strides=layout.strides or (),
        dim_names={dim: size.symbol for dim, size in dims.items()},
        is_write_index=is_write_index,
        value_bound=value_bound,
    )
