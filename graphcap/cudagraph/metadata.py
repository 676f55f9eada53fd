"""The inputs of a step, for the ops of a call that is padded or captured: static tensors of the padded sizes.

A captured op that reads ``graphcap.current_step().inputs["seq_lens"]`` keeps its address, and the padded rows of a
batch have metadata as well. So each plan has buffers of its own for what is read during its warm-up, filled anew before
every replay.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from graphcap.cudagraph.corner import fill_around
from graphcap.cudagraph.step import StepInputs, serving_now
from graphcap.errors import StepError

#: How a step's input is named among declared dims and fills: ``"step.seq_lens"``.
PREFIX = "step."


def dims_of_step(declared: Mapping[str, Any] | None) -> dict[str, dict[int, str]]:
    """Of the declared dims those of step inputs: ``{"step.seq_lens": {0: "num_reqs"}}``."""
    found = {}
    for path, dims in (declared or {}).items():
        if path.startswith(PREFIX):
            named = dims if isinstance(dims, Mapping) else {dims: "num_tokens"}
            found[path] = {int(dim): str(getattr(name, "name", name)) for dim, name in named.items()}
    return found


class Serving:
    """The step inputs of one route. While it is entered, ops of the model find these."""

    def __init__(
        self, named: Mapping[str, int], dims: Mapping[str, Mapping[int, str]], fills: Mapping[str, Any]
    ) -> None:
        """Nothing is allocated yet.

        Args:
            named: the padded size of each declared dim.
            dims: per input the names of its dims.
            fills: per input what fills its padded rows.
        """
        self.is_recording = False
        self._named = named
        self._dims = dims
        self._fills = fills
        self._buffers: dict[str, torch.Tensor] = {}
        self._token: Any = None

    def __enter__(self) -> None:
        self._token = serving_now.set(self)

    def __exit__(self, *_: object) -> None:
        serving_now.reset(self._token)

    @property
    def is_used(self) -> bool:
        """Whether an input was read."""
        return bool(self._buffers)

    def resolve(self, name: str, given: Any) -> Any:
        """The buffer of an input; made and filled at its first use, which is in a warm-up.

        What is no tensor, and what has a dim that the plan does not depend on, is the engine's own.

        Raises:
            StepError: another dtype or another size than the buffer's, or a first use while recording.
        """
        if not isinstance(given, torch.Tensor) or any(each not in self._named for each in self._names(name).values()):
            return given
        if name not in self._buffers:
            if self.is_recording:
                raise StepError(f"step input {name!r} is read in a capture and was not read in the warm-up before it")
            with torch.inference_mode(False):
                size = self._padded_size(name, given)
                self._buffers[name] = torch.empty(size, dtype=given.dtype, device=given.device)
            self._copy(name, given)
        return self._buffers[name]

    def refresh(self, inputs: StepInputs) -> None:
        """Copy what the step brings into the buffers that exist.

        Raises:
            StepError: an input is missing or has changed its form.
        """
        for name in self._buffers:
            given = inputs.given(name)
            if given is None:
                raise StepError(f"the graph reads step input {name!r}, which this step does not bring")
            self._copy(name, given)

    def _padded_size(self, name: str, given: torch.Tensor) -> tuple[int, ...]:
        names = self._names(name)
        size = tuple(self._named[names[dim]] if dim in names else real for dim, real in enumerate(given.shape))
        if any(real > padded for real, padded in zip(given.shape, size, strict=True)):
            raise StepError(f"step input {name!r} has size {tuple(given.shape)}, more than the padded {size}")
        return size

    def _names(self, name: str) -> Mapping[int, str]:
        return self._dims.get(PREFIX + name, {})

    def _copy(self, name: str, given: torch.Tensor) -> None:
        buffer = self._buffers[name]
        if given.dtype is not buffer.dtype or given.dim() != buffer.dim():
            raise StepError(
                f"step input {name!r} is {given.dtype} {tuple(given.shape)}; the graph was captured with "
                f"{buffer.dtype} {tuple(buffer.shape)}"
            )
        real = buffer
        for dim, size in enumerate(given.shape):
            if size > buffer.shape[dim]:
                raise StepError(f"step input {name!r} has size {tuple(given.shape)}, the graph {tuple(buffer.shape)}")
            real = real.narrow(dim, 0, size)
        with torch.no_grad():
            real.copy_(given, non_blocking=True)
            fill_around(buffer, given.shape, self._fills.get(PREFIX + name, 0))
