"""What an engine asks of a compiled model: how a batch is going to run, and to have its ladder captured beforehand."""

from __future__ import annotations

import contextlib
import gc
import logging
import time
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from graphcap.compiler.frontend.api import record_of
from graphcap.compiler.frontend.subject import runners_of
from graphcap.compiler.region import all_regions
from graphcap.config import Config, CUDAGraphMode
from graphcap.cudagraph import Dispatch, GraphKey, GraphRunner, step
from graphcap.cudagraph.ladder import default_sizes
from graphcap.cudagraph.phase import Keeper, Phase, in_phase
from graphcap.cudagraph.step import RUNTIME_MODES, as_runtime_mode
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


def dispatch(
    model: Any,
    *,
    num_tokens: int,
    num_reqs: int | None = None,
    uniform_query_len: int | None = None,
    tags: Mapping[str, Hashable] | None = None,
    max_mode: CUDAGraphMode | str | None = None,
) -> Dispatch:
    """How a batch is going to run, before it runs: an engine builds its metadata at the padded sizes, and data-parallel
    ranks can agree on one decision and hand it to :class:`graphcap.step`.

    Args:
        model: what was compiled.
        num_tokens: rows of the batch.
        num_reqs: requests in it.
        uniform_query_len: the tokens of each request where all have the same number.
        tags: as for :class:`graphcap.step`.
        max_mode: the most that this batch may use.

    Returns:
        The mode and the padded sizes. A model with several graphs runs by the best of their modes.

    Raises:
        StepError: sizes that no batch has.
        TypeError: ``model`` is nothing that could have been compiled.
    """
    key = GraphKey(num_tokens, num_reqs, uniform_query_len, GraphKey.sorted_tags(tags))
    limit = as_runtime_mode(max_mode)
    decisions = [runner.dispatch(key, limit) for runner in _remembered_runners(model)]
    if not decisions:
        return Dispatch(CUDAGraphMode.NONE, num_tokens, num_reqs, key, "nothing is compiled yet: call or capture it")
    return max(decisions, key=lambda each: RUNTIME_MODES.index(each.mode))


def _remembered_runners(model: Any) -> list[GraphRunner]:
    """:func:`runners_of`, which walks all modules of a model, remembered until a region or runner comes or goes."""
    state = tuple((region.name, len(region.runners)) for region in all_regions())
    try:
        known = _runners_of.get(model)
    except TypeError:  # no weak reference to it is possible
        return runners_of(model)
    if known is None or known[0] != state:
        known = _runners_of[model] = state, [weakref.ref(runner) for runner in runners_of(model)]
    return [runner for ref in known[1] if (runner := ref()) is not None]


#: Per target what there was when its runners were looked for, and what was found.
_runners_of: weakref.WeakKeyDictionary[Any, tuple[Hashable, list[weakref.ref[GraphRunner]]]] = (
    weakref.WeakKeyDictionary()
)


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
        reason = ""
        for _ in range(2):  # the first capture may have shown that fewer graphs are better
            self._call(key, Phase.RECORD)
            if any(runner.has_plan(key) for runner in runners):
                return ""
            reason = next((why for runner in runners if (why := runner.dispatch(key, None).reason)), "")
            if reason:
                break
        return reason or "not captured"

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
