"""The calls that lead to a plan: the warm-up, the proof that padding changes nothing, and the capture.

Each of them serves its call: what it returns is what a live run returns, and its effects happen once. In a process
group all ranks do the same of these, and what one of them cannot do none does.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Hashable
from typing import Any

import torch

from graphcap.cudagraph.metadata import Serving, dims_of_step
from graphcap.cudagraph.observe import Observation, observe, signature_of
from graphcap.cudagraph.parts import Parts
from graphcap.cudagraph.plan import Plan
from graphcap.cudagraph.plan_capture import Made, PlanCapture
from graphcap.cudagraph.proof import prove
from graphcap.cudagraph.routes import Route
from graphcap.cudagraph.step import step

_log = logging.getLogger("graphcap.cudagraph")

_WARM_UP = "warm-up"


class PlanMaker:
    """Leads the calls of one runner to plans.

    Attributes:
        capture: the last step on the way.
    """

    def __init__(self, parts: Parts) -> None:
        self.capture = PlanCapture(parts)
        self._program, self._device, self._config = parts.program, parts.device, parts.config
        self._padding, self._router, self._table = parts.padding, parts.router, parts.table
        self._agreement, self._question = parts.agreement, parts.question
        self._observations: dict[Hashable, Observation] = {}
        self._servings: dict[Hashable, Serving] = {}
        self._step_dims = dims_of_step(parts.config.dynamic_arg_dims)
        self._proven: dict[Hashable, set[str]] = {}  # per family of plans the symbols that have been proven

    def reconsider(self) -> None:
        """Try again what was not possible for want of memory."""
        if symbols := self._padding.reconsider():
            # Plans for the exact size would be in the place of padded ones.
            self._table.drop_if(lambda plan: not symbols <= plan.route.rung.keys())
        self.capture.room.clear()

    def clear(self) -> None:
        """Give up the buffers of step inputs, and what is known about the room on the device."""
        self._servings.clear()
        self.capture.room.clear()

    def forget(self, route: Route) -> None:
        """Let the next call be a warm-up again."""
        known = self._observations.pop(route.key, None)
        if known is not None:
            self._observations[None] = known  # a proof asks for any call that was seen

    def no_room(self, route: Route) -> str:
        """Why the device has no room for a plan, ``""`` where it may."""
        return self.capture.room.closed(route.key)

    def why_not_together(self, route: Route, said: step | None) -> str:
        """Why a call that follows one decision for several ranks is not captured; ``""`` where it may be."""
        if not self._decided_together(said) or route.rung or all(size is None for size in route.sizes):
            return ""
        return "ranks with one dispatch may have different sizes, and these are not padded"

    def may_serve(self, plan: Plan, args: tuple[Any, ...], said: step | None) -> bool:
        """Whether a plan serves a call of this size: one that is padded only after the proof. One that is not may be
        padded on another rank, where their sizes follow one decision."""
        smaller = set(plan.route.rung) if self._decided_together(said) else self._smaller(plan.route, args)
        if not smaller:
            return True
        return self._is_proven(plan.route, smaller) and not self._padding.why_not_to(plan.route.rung, args)

    def serve(self, route: Route, args: tuple[Any, ...], said: step | None) -> Made:
        """Serve a call that leads to the plan of a route, or has just lost it."""
        serving = self._serving_of(route, said)
        reason = self._padding.why_not_to(route.rung, args) if route.rung else ""
        reason = self._agreement.reason(self._question("may it be captured", route), reason)
        if reason:
            return Made(self._program.run(*args), reason)
        smaller = self._smaller_anywhere(route, args)
        if not self._is_proven(route, smaller):
            return Made(self._prove(route, smaller, args, serving), _WARM_UP)
        padded = tuple(self._padding.pad(args, route.rung)) if route.rung else args
        return self._at_size(route, args, padded, serving)

    def _decided_together(self, said: step | None) -> bool:
        """Whether the sizes of this call may be others on other ranks, with one decision for all."""
        return self._agreement.is_group and said is not None and said.dispatch is not None

    def _smaller_anywhere(self, route: Route, args: tuple[Any, ...]) -> set[str]:
        """The symbols that a call has to be padded in on any rank."""
        mine = self._smaller(route, args)
        return set[str]().union(*self._agreement.gather(self._question("what is padded", route), mine, usual=set()))

    def _family(self, route: Route) -> Hashable:
        batch = route.batch  # the number of requests goes with the rung, what is proven does not
        return batch.uniform_query_len, batch.tags, frozenset(route.rung)

    def _smaller(self, route: Route, args: tuple[Any, ...]) -> set[str]:
        """The symbols that a call has to be padded in."""
        real = self._padding.sizes(args) or {}
        return {symbol for symbol, size in route.rung.items() if real.get(symbol) != size}

    def _is_proven(self, route: Route, symbols: set[str]) -> bool:
        return symbols <= self._proven.get(self._family(route), set())

    def _prove(
        self, route: Route, smaller: set[str], args: tuple[Any, ...], serving: Serving | None
    ) -> tuple[Any, ...]:
        """The first call that would be padded runs at its own size, and shows whether it may be."""
        captured = self._router.captured(route)
        seen = next(iter(self._observations.values()), None)
        question = self._question("was there a call before", route)
        all_seen = all(self._agreement.gather(question, seen is not None, usual=True))
        if seen is None or not all_seen:
            self._observations[None], outputs = observe(self._program, args, self._device.device, captured)
            return outputs
        verdict = prove(
            self._program, args, self._padding, route.rung, seen, self._device.device, self._device.spare_bytes(),
            captured, lambda: serving or contextlib.nullcontext(), self._agreement,
        )  # fmt: skip
        if verdict.reason:
            refuse = self._padding.put_off if verdict.is_open else self._padding.refuse
            refuse(route.rung, verdict.reason)
            _log.warning("%s is not padded: %s", self._program.name, verdict.reason)
        else:
            self._proven.setdefault(self._family(route), set()).update(smaller)
            if verdict.seen is not None:
                self._observations.setdefault(route.key, verdict.seen)
        return verdict.outputs

    def _at_size(self, route: Route, args: tuple[Any, ...], padded: tuple[Any, ...], serving: Serving | None) -> Made:
        """Serve a call at the sizes of a route: capture if an earlier call has shown how values share memory;
        otherwise let this one show it."""
        known = self._observations.get(route.key)
        captured = self._router.captured(route)
        with serving or contextlib.nullcontext():
            is_known = known is not None and known.signature == signature_of(self._program, padded, captured)
            is_known = all(self._agreement.gather(self._question("is it warmed up", route), is_known, usual=True))
            if known is None or not is_known:
                known, outputs = observe(self._program, padded, self._device.device, captured)
                self._observations[route.key] = known
                made = Made(outputs, _WARM_UP)
            else:
                made = self.capture.serve(route, known, padded, serving)
        if route.rung:
            return made._replace(outputs=self._padding.hand_back(args, padded, made.outputs, known))
        return made

    def _serving_of(self, route: Route, said: step | None) -> Serving | None:
        if said is None or not said.inputs:
            return None
        if route.key not in self._servings:
            self._servings[route.key] = Serving(route.named, self._step_dims, self._config.pad)
        serving = self._servings[route.key]
        with torch.no_grad():
            serving.refresh(said.inputs)
        return serving
