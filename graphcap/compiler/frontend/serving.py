"""``graphcap.capture``: the ladder of a model captured before its traffic comes, or at its first call."""

from __future__ import annotations

import weakref
from typing import Any

from graphcap.compiler.frontend.api import target_of
from graphcap.compiler.frontend.ladder_capture import CaptureSummary, LadderCapture
from graphcap.compiler.frontend.like_call import LikeCall
from graphcap.compiler.frontend.make_inputs import MakeInputs
from graphcap.compiler.frontend.subject import runners_of
from graphcap.compiler.frontend.target import CompiledTarget
from graphcap.config import Config
from graphcap.cudagraph import step
from graphcap.cudagraph.dispatch.phase import Keeper
from graphcap.cudagraph.dispatch.step import current
from graphcap.cudagraph.recording.recorded import describe
from graphcap.errors import StepError

#: State that a ladder's calls write into is kept and put back up to this part of a gibibyte.
_STATE_BYTES = 2**28


def capture(model: Any, make_inputs: MakeInputs | None = None) -> CaptureSummary:
    """Capture the ladder: mixed batches first, then uniform decode, each the largest first.

    Call it in the mode in which the model is going to serve (``torch.inference_mode()`` or ``torch.no_grad()``).
    Buffers of the model that its calls write into are put back afterwards where they are small; what is larger is
    written with what the inputs make the model write, so give indices that point nowhere. A call that records a further
    size does without live attention that only writes: code of the model around it finds zeros there.

    Args:
        model: what :func:`graphcap.compile` or ``@support_graph_compile`` compiled.
        make_inputs: called inside of ``graphcap.step(key)`` afresh for each warm-up and for the capture, so that
            nothing can be frozen that changes from call to call. Gives ``(args, kwargs)``, or ``(args, kwargs,
            inputs)`` where ops of the model read ``graphcap.current_step().inputs``.
            Without it the ladder is captured at the next call of the model, right after that was served, with inputs
            like it: every tensor of ``dynamic_arg_dims`` in the size of the rung, with its fill of ``pad=`` in every
            element (0 where there is none, the first row of the call for ``"edge"``), and everything else as in the
            call. What goes wrong then is a warning, never an error of that call.

    Returns:
        What was captured, what was not and why, and what it took. Without ``make_inputs`` it is filled in later.

    Raises:
        StepError: no size is declared, neither by ``capture_sizes`` nor by dims that may be padded; or there is no
            ``make_inputs`` and nothing that could bring the inputs.
        TypeError: ``model`` is nothing that could have been compiled.
        Exception: what ``make_inputs`` or the model raises.
    """
    target, summary = target_of(model), CaptureSummary()
    if make_inputs is None:
        if target is None or target.is_eager or not target.dims.dims:
            raise StepError(
                "capture without make_inputs waits for a call of what graphcap.compile or @support_graph_compile "
                "compiled with dynamic dims: give make_inputs, or dynamic_arg_dims"
            )
        summary.waits_for = target.name
        target.call_instead(_AtNextCall(target, summary))
        return summary
    config = Config.resolve() if target is None else target.config
    LadderCapture(model, config, model, make_inputs, Keeper(_STATE_BYTES), summary).run()
    return summary


class _AtNextCall:
    """Stands in for a target at one call: serves it, and captures the ladder with inputs like it."""

    def __init__(self, target: CompiledTarget, summary: CaptureSummary) -> None:
        self._target = weakref.ref(target)  # which holds this
        self._summary = summary

    def __call__(self, bound: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        target, said = self._target(), current()
        assert target is not None, "it is being called"
        result = _served_live(target, said, bound, args, kwargs)
        if target.call_again(self):
            self._summary.waits_for = ""
            try:
                self._capture(target, said, bound, args, kwargs)
            except Exception as error:  # the call was served, and so is every later one
                self._summary.warn(f"{target.name}: the ladder is not captured: {describe(error)}")
        return result

    def _capture(
        self,
        target: CompiledTarget,
        said: step | None,
        bound: tuple[Any, ...],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        like = LikeCall(target.dims, target.config, args, kwargs, said)
        stray = [name for runner in runners_of(target) for name in runner.padding.undeclared_write_indices()]
        why = f"{stray[0]} says where it is written: pad={{{stray[0]!r}: ...}} must say with what" if stray else ""
        keeper = Keeper(_STATE_BYTES, like.lent, why)

        def call(*args: Any, **kwargs: Any) -> None:
            target.call(bound, args, kwargs)

        LadderCapture(target, target.config, call, like.at, keeper, self._summary, like.tags).run()


def _served_live(
    target: CompiledTarget, said: step | None, bound: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Serve a call without a graph: what a replay returns may be overwritten while the ladder is captured."""
    key, decision, inputs = (None, None, None) if said is None else (said.key, said.dispatch, said.inputs.given)
    with step(key=key, dispatch=decision, max_mode="NONE", inputs=inputs):
        return type(target).call(target, bound, args, kwargs)
