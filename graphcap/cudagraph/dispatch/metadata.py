"""The inputs of a step, for the ops of a call that is padded or captured: static tensors of the padded sizes.

A captured op that reads ``graphcap.current_step().inputs["seq_lens"]`` keeps its address, and the padded rows of a
batch have metadata as well. So each plan has buffers of its own for what is read during its warm-up, filled anew before
every replay.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from graphcap.cudagraph.dispatch.in_force import serving_now
from graphcap.cudagraph.dispatch.step_inputs import StepInputs
from graphcap.cudagraph.padded.corner import Fill, corner, fill_around
from graphcap.errors import StepError

#: How a step's input is named among declared dims and fills: ``"step.seq_lens"``.
PREFIX = "step."

_MAX_FITS = 1024  #: sets of sizes that are remembered for one plan

#: Size and dtype of each input that has a buffer, in the order of the buffers.
_Form = tuple[tuple[torch.Size, torch.dtype], ...]
#: A buffer, the size of the part that a step fills, and what lies around it.
_FillAround = tuple[torch.Tensor, torch.Size, Fill]


class _Fit(NamedTuple):
    """What brings inputs of one set of sizes into the buffers.

    Attributes:
        copies: for each dtype the parts of the buffers, and which of the inputs go there.
        fills: those to be written on every call.
        all_fills: those, and the constant ones, which last while the sizes stay.
    """

    copies: Sequence[tuple[list[torch.Tensor], list[int]]]
    fills: Sequence[_FillAround]
    all_fills: Sequence[_FillAround]


def dims_of_step(declared: Mapping[str, Any] | None) -> dict[str, dict[int, str]]:
    """Of the declared dims those of step inputs, without the prefix: ``{"seq_lens": {0: "num_reqs"}}``."""
    found = {}
    for path, dims in (declared or {}).items():
        if path.startswith(PREFIX):
            named = dims if isinstance(dims, Mapping) else {dims: "num_tokens"}
            names = {int(dim): str(getattr(name, "name", name)) for dim, name in named.items()}
            found[path.removeprefix(PREFIX)] = names
    return found


def largest_of_step(declared: Mapping[str, Any] | None) -> dict[str, int]:
    """The sizes of buffers that dims of step inputs have whatever the batch is: ``{"blocks": 512}``."""
    paths = [dims for path, dims in (declared or {}).items() if path.startswith(PREFIX)]
    named = [dim for dims in paths if isinstance(dims, Mapping) for dim in dims.values()]
    return {dim.name: dim.max for dim in named if getattr(dim, "max", None) is not None}


class _Outer(threading.local):
    """What was in force before, for each thread that entered."""

    def __init__(self) -> None:
        self.stack: list[Serving | None] = []


class Serving:
    """The step inputs of one route. While it is entered, ops of the model find these."""

    def __init__(
        self, named: Mapping[str, int], dims: Mapping[str, Mapping[int, str]], fills: Mapping[str, Any]
    ) -> None:
        """Nothing is allocated yet.

        Args:
            named: the size of each declared dim in the buffers.
            dims: per input the names of its dims.
            fills: per input what fills its padded rows.
        """
        self.is_recording = False
        self._named = named
        self._dims = dims
        self._fills = fills
        self._buffers: dict[str, torch.Tensor] = {}
        self._fits: dict[_Form, _Fit] = {}
        self._latest: _Fit | None = None  # whose constant fills are in the buffers
        self._outer = _Outer()

    def __enter__(self) -> None:
        self._outer.stack.append(serving_now.get())
        serving_now.set(self)

    def __exit__(self, *_: object) -> None:
        serving_now.set(self._outer.stack.pop())

    @property
    def is_used(self) -> bool:
        """Whether an input was read."""
        return bool(self._buffers)

    @property
    def names(self) -> frozenset[str]:
        """The inputs that have a buffer."""
        return frozenset(self._buffers)

    def resolve(self, name: str, given: Any) -> Any:
        """The buffer of an input; made and filled at its first use, which is in a warm-up.

        What is no tensor, and what has a dim that the plan does not depend on, is the engine's own.

        Raises:
            StepError: a size above the padded one, or a first use while recording.
        """
        buffer = self._buffers.get(name)
        if buffer is not None:
            return buffer
        if not isinstance(given, torch.Tensor) or self._unknown(name):
            return given
        if self.is_recording:
            raise StepError(f"step input {name!r} is read in a capture and was not read in the warm-up before it")
        with torch.inference_mode(False), torch.no_grad():
            buffer = torch.empty(self._padded_size(name, given), dtype=given.dtype, device=given.device)
            corner(buffer, given.shape).copy_(given, non_blocking=True)
            fill_around(buffer, given.shape, self._fill(name))
        self._buffers[name] = buffer
        self._fits.clear()
        return buffer

    def why_not_held(self, names: Iterable[str], inputs: StepInputs) -> str:
        """Why a graph cannot read these inputs, ``""`` where it can: those of the next step are somewhere else."""
        for name in names:
            if isinstance(inputs.given.get(name), torch.Tensor) and (dim := self._unknown(name)):
                return (
                    f"a graph would read step input {name!r}, whose dim {dim!r} follows no size of the call: declare "
                    f"its largest size, Dim({dim!r}, max=...)"
                )
        return ""

    def refresh(self, inputs: StepInputs) -> None:
        """Copy what the step brings into the buffers that exist. To be called without grad.

        What is known for a set of sizes is worked out at its first call: later ones are a look-up and one copy for
        each dtype, and constant fills are written where the call before had other sizes.

        Raises:
            StepError: an input is missing or has changed its form.
        """
        if not self._buffers:
            return
        try:
            given = [inputs.given[name] for name in self._buffers]
            form = tuple([(each.shape, each.dtype) for each in given])
        except (KeyError, AttributeError):
            raise self._missing(inputs) from None
        fit = self._fits.get(form)
        if fit is None:
            fit = self._fit(form)
        fills = fit.fills if fit is self._latest else fit.all_fills
        self._latest = None  # until everything is written: a fill of the user's may raise
        for targets, order in fit.copies:
            torch._foreach_copy_(targets, [given[position] for position in order], non_blocking=True)
        for buffer, size, fill in fills:
            fill_around(buffer, size, fill)
        self._latest = fit

    def _fit(self, form: _Form) -> _Fit:
        """How inputs of these sizes and dtypes get into the buffers."""
        copies: dict[torch.dtype, tuple[list[torch.Tensor], list[int]]] = {}
        fills: list[_FillAround] = []
        for position, ((name, buffer), (size, dtype)) in enumerate(zip(self._buffers.items(), form, strict=True)):
            if dtype is not buffer.dtype or len(size) != buffer.dim():
                raise StepError(
                    f"step input {name!r} is {dtype} {tuple(size)}; the graph was captured with "
                    f"{buffer.dtype} {tuple(buffer.shape)}"
                )
            if any(real > padded for real, padded in zip(size, buffer.shape, strict=True)):
                raise StepError(f"step input {name!r} has size {tuple(size)}, the graph {tuple(buffer.shape)}")
            if size.numel():
                targets, order = copies.setdefault(dtype, ([], []))
                targets.append(corner(buffer, size))
                order.append(position)
            if size != buffer.shape:
                fills.append((buffer, size, self._fill(name)))
        if len(self._fits) >= _MAX_FITS:
            self._fits.clear()
        changing = [each for each in fills if not isinstance(each[2], (bool, int, float))]
        fit = self._fits[form] = _Fit(list(copies.values()), changing, fills)
        return fit

    def _missing(self, inputs: StepInputs) -> StepError:
        for name in self._buffers:
            if name not in inputs.given:
                return StepError(f"the graph reads step input {name!r}, which this step does not bring")
        odd = next(name for name in self._buffers if not isinstance(inputs.given[name], torch.Tensor))
        kind = type(inputs.given[odd]).__name__
        return StepError(f"step input {odd!r} is a {kind}; the graph was captured with a tensor")

    def _padded_size(self, name: str, given: torch.Tensor) -> tuple[int, ...]:
        names = self._names(name)
        size = tuple(self._named[names[dim]] if dim in names else real for dim, real in enumerate(given.shape))
        if any(real > padded for real, padded in zip(given.shape, size, strict=True)):
            raise StepError(f"step input {name!r} has size {tuple(given.shape)}, more than the padded {size}")
        return size

    def _unknown(self, name: str) -> str:
        """A dim of an input that the plan does not depend on, ``""`` where there is none."""
        return next((each for each in self._names(name).values() if each not in self._named), "")

    def _names(self, name: str) -> Mapping[int, str]:
        return self._dims.get(name, {})

    def _fill(self, name: str) -> Fill:
        fill: Fill = self._fills.get(PREFIX + name, 0)
        return fill
