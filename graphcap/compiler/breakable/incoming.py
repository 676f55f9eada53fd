"""One call of a target on its way to an entry: what it was given, and how to run it, as it is or with other tensors."""

from __future__ import annotations

import contextlib
import operator
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from graphcap.compiler import private
from graphcap.compiler.breakable.key import Arguments
from graphcap.compiler.breakable.watch import Watch
from graphcap.cudagraph.dispatch.step import current, step


class Incoming:
    """A call.

    Attributes:
        arguments: what it was given, flat.
        at: the declared sizes.
        step_names: the inputs of a step that are among them, where the step brings them.
        outside: the tensors from outside, found for it.
        watch: what has found them.
        has_run: whether the function itself has run.
        result: what that returned.
        redo: while the effects of the function are taken back, puts them there again.
        ran_live: whether that was asked for.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        arguments: Arguments,
        step_names: frozenset[str],
        names: Callable[[], list[str]],
    ) -> None:
        """Nothing has run yet; ``names`` gives what a user would call each leaf of the arguments."""
        self.arguments = arguments
        self.at = tuple(arguments.sizes.values.values())
        self.step_names = step_names
        self.names = names
        self.outside: list[torch.Tensor] = []
        self.watch: Watch | None = None
        self.has_run = False
        self.result: Any = None
        self.redo: Callable[[], None] | None = None
        self.ran_live = False
        self._function, self._args, self._kwargs = function, args, kwargs

    def run(self) -> Any:
        """Run the function itself."""
        return self._function(*self._args, **self._kwargs)

    def serve(self) -> tuple[torch.Tensor, ...]:
        """Have the function itself serve this call. Where it has run and its effects were taken back, they are put back
        once more. Returns the tensors of the result."""
        if self.redo is None:
            self.result, self.has_run = self.run(), True
        else:
            self.redo()
            self.ran_live = True
        return tuple(leaf for leaf in private.tree_flatten(self.result)[0] if isinstance(leaf, torch.Tensor))

    @contextlib.contextmanager
    def with_tensors(self, replaced: Mapping[int, torch.Tensor]) -> Iterator[Callable[[], Any]]:
        """Within it, the function that is given runs the call with other tensors, by ``id`` of its own."""
        leaves, spec = private.tree_flatten((self._args, self._kwargs))
        args, kwargs = private.tree_unflatten([replaced.get(id(leaf), leaf) for leaf in leaves], spec)
        said = current()
        if said is None:
            yield lambda: self._function(*args, **kwargs)
            return
        inputs = {name: replaced.get(id(value), value) for name, value in said.inputs.given.items()}
        with step(key=said.key, dispatch=said.dispatch, max_mode=said.max_mode, inputs=inputs):
            yield lambda: self._function(*args, **kwargs)


class InProgress(threading.local):
    """The call that this thread is serving: where the graph runtime wants it live, the function itself runs.

    Attributes:
        call: ``None`` outside of one.
        inputs: of the program in this call.
    """

    call: Incoming | None = None
    inputs: Sequence[Any] = ()

    def run(self, stitched: Callable[..., Any], inputs: tuple[Any, ...]) -> Any:
        """The outputs of a program.

        Args:
            stitched: runs its steps, as they were recorded.
            inputs: of the program: those of the call, or padded ones, or copies.
        """
        call = self.call
        if call is None or not all(map(operator.is_, inputs, self.inputs)):
            return stitched(*inputs)
        return call.serve()
