"""A ladder captured on purpose: which calls that takes, and what came of it."""

from __future__ import annotations

import contextlib
import logging
import math
import time
import warnings
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from graphcap.compiler.frontend.make_inputs import MakeInputs, made_for
from graphcap.compiler.frontend.marked_call import DYNAMIC
from graphcap.compiler.frontend.subject import subject_of
from graphcap.compiler.region import Region
from graphcap.config import Config
from graphcap.cudagraph import GraphKey, GraphRunner, step
from graphcap.cudagraph.dispatch.ladder import default_sizes
from graphcap.cudagraph.dispatch.phase import Keeper, Phase, in_phase
from graphcap.cudagraph.hardware.collector import without_collector
from graphcap.errors import StepError
from graphcap.progress import Progress

log = logging.getLogger(__name__)

#: Calls to be captured: the first may show that fewer graphs are better, or that the size is unlike others, which takes
#: a warm-up more.
_RECORDINGS = 3

_WARMUPS = 2  #: of a batch that is the first of its kind, where nobody says how many


@dataclass
class CaptureSummary:
    """What :func:`graphcap.capture` did. ``print`` it.

    Attributes:
        captured: the batches that have a graph now.
        skipped: those that have none, each with the reason.
        seconds: how long it took, warm-ups included.
        bytes: growth of device memory, graphs, pool and static buffers together.
        warnings: what should be looked at, one line each.
        waits_for: the model whose next call brings the inputs, after which the rest is filled in; ``""`` afterwards.
    """

    captured: tuple[GraphKey, ...] = ()
    skipped: Mapping[GraphKey, str] = field(default_factory=dict)
    seconds: float = 0.0
    bytes: int = 0
    warnings: list[str] = field(default_factory=list)
    waits_for: str = ""

    def __str__(self) -> str:
        if self.waits_for:
            return f"waiting for the next call of {self.waits_for}"
        graphs = "1 graph" if len(self.captured) == 1 else f"{len(self.captured)} graphs"
        lines = [f"{graphs}, {self.seconds:.2f} s, {self.bytes / 2**20:.1f} MiB"]
        for reason in dict.fromkeys(self.skipped.values()):
            batches = [str(key) for key, each in self.skipped.items() if each == reason]
            shown = "; ".join(batches[:3]) + (f"; and {len(batches) - 3} more" if len(batches) > 3 else "")
            lines.append(f"not captured: {shown}: {reason}")
        return "\n".join([*lines, *(f"warning: {each}" for each in self.warnings)])

    def warn(self, warning: str) -> None:
        """Say so now, and keep it."""
        self.warnings.append(warning)
        warnings.warn(f"graphcap.capture: {warning}", stacklevel=3)


class LadderCapture:
    """The calls of one model for the sake of its ladder."""

    def __init__(
        self,
        model: Any,
        config: Config,
        call: Callable[..., Any],
        make_inputs: MakeInputs,
        keeper: Keeper,
        summary: CaptureSummary,
        tags: tuple[tuple[str, Hashable], ...] = (),
    ) -> None:
        """Do nothing yet.

        Args:
            model: what was compiled.
            config: its settings.
            call: takes what ``make_inputs`` gives, and calls the model with it.
            make_inputs: see :data:`MakeInputs`.
            keeper: of the state that the calls write into.
            summary: is filled in.
            tags: of every batch.
        """
        self._tags = tags
        self._model, self._subject = model, subject_of(model)
        self._config, self._call_model = config, call
        self._make_inputs, self._keeper, self._summary = make_inputs, keeper, summary
        self._regions: list[Region] = []

    def run(self) -> None:
        """Capture: mixed batches first, then uniform decode, each the largest first.

        Raises:
            StepError: no size is declared.
            Exception: what ``make_inputs`` or the model raises.
        """
        started = time.perf_counter()
        with contextlib.ExitStack() as session:
            session.enter_context(without_collector())
            if torch.is_grad_enabled():
                session.enter_context(torch.no_grad())
            session.callback(self._keeper.restore)
            keys = self._prepare()
            used = self._used_bytes()
            session.callback(lambda: self._sum_up(started, used))
            bar = session.enter_context(Progress("capturing", len(keys), enabled=self._config.progress))
            before: GraphKey | None = None
            for key in keys:
                self._capture(key)
                self._prove_padding(key, is_first=before is None or before.uniform_query_len != key.uniform_query_len)
                self._look_for_other_graphs(key)
                before = key
                if bar.visible:
                    bar.advance(f"{key}, {max(0, self._used_bytes() - used) / 2**20:.0f} MiB")
        for region in self._regions:
            region.is_captured_ahead |= any(runner.stats.plans for runner in region.runners)
        if self._keeper.not_kept:
            log.info("%.0f MiB of state were too large to be put back after the capture", self._keeper.not_kept / 2**20)

    def _prepare(self) -> list[GraphKey]:
        """Have something to capture: the batches, in order."""
        for runner in self._runners():
            runner.reconsider()
        first = _first_key(self._config)
        for key in (first, _smaller(first), first):  # without Dynamo, calls of two sizes show what follows a size
            if not self._runners():
                self._call(key, Phase.WARM_UP)
        self._subject = subject_of(self._model)  # from now on its modules stay what they are
        self._regions = self._subject.regions()
        keys = dict.fromkeys(key for runner in self._runners() for key in runner.router.ladder.batches())
        if not keys:
            raise StepError(
                "there is no ladder to capture: give capture_sizes=, or dynamic_arg_dims= whose dims may be padded"
            )
        return [replace(key, tags=self._tags) for key in keys]

    def _runners(self) -> list[GraphRunner]:
        return self._subject.runners()

    def _capture(self, key: GraphKey) -> None:
        """Warm up and record."""
        self._warm_up(key)
        summary, reasons = self._summary, list[str]()
        for _ in range(_RECORDINGS):
            # Where there are several graphs, what one of them leaves may decide where the others are called.
            self._call(key, Phase.RECORD, is_unread=len(self._runners()) == 1)
            runners = self._runners()
            if any(runner.outlook.has_plan(key) for runner in runners):
                summary.captured = (*summary.captured, key)
                return
            reasons = [reason for runner in runners if (reason := runner.outlook.dispatch(key, None).reason)]
            if reasons:
                break
        summary.skipped = {**summary.skipped, key: reasons[0] if reasons else "not captured"}

    def _warm_up(self, key: GraphKey) -> None:
        wanted = self._config.num_warmups
        for _ in range(_WARMUPS if wanted is None else wanted):
            if wanted is None and all(runner.outlook.is_told_by_others(key) for runner in self._runners()):
                return
            self._call(key, Phase.WARM_UP)

    def _prove_padding(self, key: GraphKey, *, is_first: bool) -> None:
        """Make the padded calls in which padding has to prove itself: of the first batch of a kind that any is padded
        to, and of those for which that proof does not hold."""
        for runner in self._runners():
            short = runner.router.ladder.short_of(key)
            if short is not None and (is_first or runner.outlook.lacks_proof(short)):
                self._call(short, Phase.WARM_UP)
                is_first = False

    def _call(self, key: GraphKey, phase: Phase, *, is_unread: bool = False) -> None:
        with step(key=key):
            args, kwargs, inputs = made_for(key, self._make_inputs)
        purpose = in_phase(phase, self._keeper, is_unread=is_unread)
        with step(key=key, inputs=inputs), purpose:
            self._call_model(*args, **kwargs)

    def _sum_up(self, started: float, used: int) -> None:
        self._summary.seconds = time.perf_counter() - started
        self._summary.bytes = max(0, self._used_bytes() - used)

    def _used_bytes(self) -> int:
        return max((runner.device.used_bytes() for runner in self._runners()), default=0)

    def _look_for_other_graphs(self, key: GraphKey) -> None:
        """Warn where the inputs of a batch were traced anew: the plans that they get are not those that serve."""
        known, self._regions = self._regions, self._subject.regions()
        if self._has_graph_of_its_own(key):
            return
        for region in [each for each in self._regions if each not in known and each.recompiled_because]:
            self._summary.warn(
                f"the inputs for {key} made another graph of {region.function} than earlier calls, because of the "
                f"guard {region.recompiled_because}. Its plans serve only calls that are alike: give the "
                "model here what it is given in service"
            )

    def _has_graph_of_its_own(self, key: GraphKey) -> bool:
        """Where dims could not be left open, size 1 has one by right."""
        record = self._subject.record
        sizes = (key.num_tokens, key.num_reqs, *(size for _, size in key.sizes))
        return record is not None and record.marking == DYNAMIC and 1 in sizes


def _first_key(config: Config) -> GraphKey:
    """The batch that a model is compiled with: the largest declared one, so that its memory is seen first."""
    declared = config.capture_sizes
    largest = {name: max(sizes) for name, sizes in declared.items()} if isinstance(declared, Mapping) else {}
    further = {name: size for name, size in largest.items() if name not in ("num_tokens", "num_reqs")}
    if further and "num_tokens" not in largest:
        return GraphKey.of_sizes(further, num_reqs=largest.get("num_reqs"))
    sizes = None if isinstance(declared, Mapping) else declared
    tokens = largest.get("num_tokens") or max(sizes or default_sizes(config.max_capture_size))
    return GraphKey.of_sizes(further, tokens, num_reqs=min(tokens, config.max_num_reqs or tokens))


def _smaller(key: GraphKey) -> GraphKey:
    """A batch that is smaller by one in every size that is above 1."""
    sizes = {name: max(1, size - 1) for name, size in key.sizes}
    tokens = None if key.sizes and key.num_tokens == math.prod(size for _, size in key.sizes) else key.num_tokens - 1
    reqs = None if key.num_reqs is None else max(1, key.num_reqs - 1)
    return GraphKey.of_sizes(sizes, None if tokens is None else max(1, tokens), num_reqs=reqs)
