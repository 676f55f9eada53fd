"""``graphcap.capture``: the ladder of a model captured before its traffic comes."""

from __future__ import annotations

import contextlib
import gc
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from graphcap.compiler.frontend.api import record_of
from graphcap.compiler.frontend.subject import runners_of
from graphcap.config import Config
from graphcap.cudagraph import GraphKey, GraphRunner, step
from graphcap.cudagraph.ladder import default_sizes
from graphcap.cudagraph.phase import Keeper, Phase, in_phase
from graphcap.errors import StepError
from graphcap.progress import Progress

log = logging.getLogger(__name__)

#: Takes a batch, returns the positional and keyword arguments of a call with such a batch, and the inputs of its step
#: where ops of the model read any.
MakeInputs = Callable[
    [GraphKey],
    tuple[Sequence[Any], Mapping[str, Any]] | tuple[Sequence[Any], Mapping[str, Any], Mapping[str, Any]],
]

#: State that a ladder's calls write into is kept and put back up to this part of a gibibyte.
_STATE_BYTES = 2**28


@dataclass(frozen=True)
class CaptureSummary:
    """What :func:`capture` did.

    Attributes:
        captured: the batches that have a graph now.
        skipped: those that have none, each with the reason.
        seconds: how long it took, warm-ups included.
        bytes: growth of device memory, graphs, pool and static buffers together.
    """

    captured: tuple[GraphKey, ...]
    skipped: Mapping[GraphKey, str] = field(default_factory=dict)
    seconds: float = 0.0
    bytes: int = 0


def capture(model: Any, make_inputs: MakeInputs) -> CaptureSummary:
    """Capture the ladder now: mixed batches first, then uniform decode, each the largest first.

    Call it in the mode in which the model is going to serve (``torch.inference_mode()`` or ``torch.no_grad()``).
    Buffers of the model that its calls write into are put back afterwards where they are small; what is larger is
    written with what the inputs make the model write, so give indices that point nowhere.

    Args:
        model: what :func:`graphcap.compile` or ``@support_graph_compile`` compiled.
        make_inputs: called inside of ``graphcap.step(key)`` afresh for each warm-up and for the capture, so that
            nothing can be frozen that changes from call to call. Gives ``(args, kwargs)``, or ``(args, kwargs,
            inputs)`` where ops of the model read ``graphcap.current_step().inputs``.

    Returns:
        What was captured, what was not and why, and what it took.

    Raises:
        StepError: no size is declared, neither by ``capture_sizes`` nor by dims that may be padded.
        Exception: what ``make_inputs`` or the model raises.
    """
    started, keeper = time.perf_counter(), Keeper(_STATE_BYTES)
    with contextlib.ExitStack() as session:
        session.enter_context(_without_collector())
        if torch.is_grad_enabled():
            session.enter_context(torch.no_grad())
        session.callback(keeper.restore)
        calls = _Calls(model, make_inputs, keeper)
        runners = runners_of(model) or calls.compile(_first_key(_config_of(model)))
        keys = list(dict.fromkeys(key for runner in runners for key in runner.router.ladder()))
        if not keys:
            raise StepError(
                "there is no ladder to capture: give capture_sizes=, or dynamic_arg_dims= whose dims may be padded"
            )
        used = max((runner.device.used_bytes() for runner in runners), default=0)
        bar = session.enter_context(Progress("capturing", len(keys), enabled=_config_of(model).progress))
        skipped: dict[GraphKey, str] = {}
        for position, key in enumerate(keys):
            reason = calls.capture(key, runners)
            if reason:
                skipped[key] = reason
            grown = max((runner.device.used_bytes() for runner in runners), default=0) - used
            bar.advance(f"{key.num_tokens} tokens, {grown / 2**20:.0f} MiB")
            if position == 0 or keys[position - 1].uniform_query_len != key.uniform_query_len:
                calls.prove_padding(key)
    if keeper.not_kept:
        log.info("%.0f MiB of state were too large to be put back after the capture", keeper.not_kept / 2**20)
    done = tuple(key for key in keys if key not in skipped)
    return CaptureSummary(done, skipped, time.perf_counter() - started, grown)


class _Calls:
    """Calls of a model for the sake of a capture."""

    def __init__(self, model: Any, make_inputs: MakeInputs, keeper: Keeper) -> None:
        self._model = model
        self._make_inputs = make_inputs
        self._keeper = keeper

    def compile(self, key: GraphKey) -> list[GraphRunner]:
        """Call it once, so that there is something to capture."""
        self._call(key, Phase.WARM_UP)
        return runners_of(self._model)

    def capture(self, key: GraphKey, runners: Sequence[GraphRunner]) -> str:
        """Warm up and record; why there is no graph now, ``""`` when there is one."""
        for _ in range(_config_of(self._model).num_warmups):
            self._call(key, Phase.WARM_UP)
        self._call(key, Phase.RECORD)
        if any(runner.has_plan(key) for runner in runners):
            return ""
        return next((reason for runner in runners if (reason := runner.dispatch(key, None).reason)), "not captured")

    def prove_padding(self, key: GraphKey) -> None:
        """One call that is a row short, or a request: the first padded call of its kind, which is where padding has to
        prove itself."""
        short = key.uniform_query_len or 1
        if key.num_tokens <= short:
            return
        reqs = key.num_reqs if key.num_reqs is None or key.uniform_query_len is None else key.num_reqs - 1
        tokens = key.num_tokens - short
        fewer = GraphKey(tokens, None if reqs is None else min(reqs, tokens), key.uniform_query_len, key.tags)
        self._call(fewer, Phase.WARM_UP)

    def _call(self, key: GraphKey, phase: Phase) -> None:
        with step(key=key):
            args, kwargs, *rest = self._make_inputs(key)
        with step(key=key, inputs=rest[0] if rest else None), in_phase(phase, self._keeper):
            self._model(*args, **kwargs)


def _config_of(model: Any) -> Config:
    record = record_of(model)
    return record.config if record is not None else Config.resolve()


def _first_key(config: Config) -> GraphKey:
    """The batch that a model is compiled with: the largest declared one, so that its memory is seen first."""
    declared = config.capture_sizes
    sizes = declared.get("num_tokens", ()) if isinstance(declared, Mapping) else declared
    largest = max(sizes or default_sizes(config.max_capture_size))
    return GraphKey(largest, min(largest, config.max_num_reqs or largest))


@contextlib.contextmanager
def _without_collector() -> Iterator[None]:
    """No automatic garbage collection; whether it was on, and what is frozen, is as before afterwards."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()
