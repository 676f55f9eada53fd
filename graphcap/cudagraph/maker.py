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

from graphcap.cudagraph.dispatch.asked import Asked
from graphcap.cudagraph.dispatch.key import GraphKey
from graphcap.cudagraph.dispatch.metadata import Serving, dims_of_step, largest_of_step
from graphcap.cudagraph.dispatch.route import Route
from graphcap.cudagraph.dispatch.step import current, step
from graphcap.cudagraph.made import WARM_UP, Made
from graphcap.cudagraph.padded.proof import prove
from graphcap.cudagraph.parts import Parts
from graphcap.cudagraph.plan_capture import PlanCapture
from graphcap.cudagraph.proofs import NOTHING_PADDED, Proof, Proofs
from graphcap.cudagraph.recording.knowledge import Further, Knowledge
from graphcap.cudagraph.recording.observe import Observation, observe
from graphcap.cudagraph.replaying.plan import Plan

_log = logging.getLogger("graphcap.cudagraph")


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
        # Ranks must run as many calls as each other, whatever fails where.
        further = {None: Further.UNLESS_COMPILED, 0: Further.NONE}.get(parts.config.num_warmups, Further.ALL)
        further = Further.ALL if parts.agreement.is_group else further
        self._knowledge = Knowledge(parts.program, parts.device.device, further)
        self._servings: dict[Hashable, Serving] = {}
        self._step_dims = dims_of_step(parts.config.dynamic_arg_dims)
        self._largest = largest_of_step(parts.config.dynamic_arg_dims)
        self._asked: dict[Hashable, Asked] = {}
        self._proofs = Proofs(parts)

    def reconsider(self) -> None:
        """Try again what was not possible for want of memory."""
        if symbols := self._padding.reconsider():
            # Plans for the exact size would be in the place of padded ones.
            self._table.drop_if(lambda plan: not symbols <= plan.route.rung.keys())
        self.capture.room.clear()

    def clear(self) -> None:
        """Give up the buffers of step inputs, and what is known about the room on the device."""
        for key in self._servings:  # a capture finds no buffers: another warm-up has to make them
            self.forget(key)
        self._servings.clear()
        self.capture.room.clear()

    def forget(self, key: Hashable) -> None:
        """Let the next call of a route be a warm-up again."""
        self._knowledge.cool(key)

    def is_told_by_others(self, route: Route) -> bool:
        """Whether another route of its family shows all there is to know: one more warm-up would show nothing."""
        return self._knowledge.is_told_by_others(route, self._router.captured(route))

    def no_room(self, route: Route) -> str:
        """Why the device has no room for a plan, ``""`` where it may."""
        return self.capture.room.closed(route.key)

    def why_not_together(self, route: Route, said: step | None) -> str:
        """Why a call that follows one decision for several ranks is not captured; ``""`` where it may be."""
        if not self._decided_together(said) or route.rung or all(size is None for size in route.sizes):
            return ""
        return "ranks with one dispatch may have different sizes, and these are not padded"

    def may_serve(self, plan: Plan, route: Route, args: tuple[Any, ...], said: step | None) -> bool:
        """Whether a plan serves a call on this route, which has the plan's key: one that is padded only after the
        proof, and only in what the plan may be padded in."""
        needed = self._needed_anywhere(plan, route, args, said)
        if not needed.symbols:
            return True
        may_be_padded = needed.symbols <= plan.route.rung.keys() and self._proofs.hold(plan.route, needed)
        return may_be_padded and not self._padding.why_not_to(plan.route.rung, args)

    def way_to(self, plan: Plan, route: Route, args: tuple[Any, ...], said: step | None) -> Route:
        """The route on which a call that :meth:`may_serve` refused comes to a plan that serves it: the plan's own where
        a proof is all that is missing, or else one that may be padded in what either of the two may."""
        if self._needed_anywhere(plan, route, args, said).symbols <= plan.route.rung.keys():
            return plan.route
        return plan.route.joined(route, self._padding.names)

    def lacks_proof(self, plan: Plan, route: Route, key: GraphKey) -> bool:
        """Whether a batch on this route, which has the plan's key, would be padded, and that is not proven yet."""
        needed = self._proofs.needed_of(route, key)
        return bool(needed.symbols) and not self._proofs.hold(plan.route, needed)

    def serve(self, route: Route, args: tuple[Any, ...], said: step | None) -> Made:
        """Serve a call that leads to the plan of a route, or has just lost it."""
        if said is None or not said.inputs:
            return self._serve(route, args, said)
        with self._device.lock:  # one buffer holds the inputs of one step at a time
            return self._serve(route, args, said)

    def _serve(self, route: Route, args: tuple[Any, ...], said: step | None) -> Made:
        if (asked := self._asked.pop(route.key, None)) is not None and not asked.is_alike(said):
            self._servings.pop(route.key, None)  # what the warm-up showed does not hold for such a step
            self._knowledge.doubt(route.key)
        serving = self._serving_of(route, said)
        reason = self._why_not_padded(route, args) if route.rung else ""
        reason = self._agreement.reason(self._question("may it be captured", route), reason)
        if reason:
            return Made(self._program.run(*args), reason)
        if not route.rung:
            return self._at_size(route, args, args, serving)
        mine = self._proofs.needed(route, args, said)
        everywhere = self._agreement.gather(self._question("what is padded", route), mine, usual=NOTHING_PADDED)
        symbols = frozenset[str]().union(*(each.symbols for each in everywhere))
        common = mine.special.intersection(*(each.special for each in everywhere))
        if not self._proofs.hold(route, Proof(symbols, common)):
            proof = Proof(symbols, mine.special.union(*(each.special for each in everywhere)))
            return Made(self._prove(route, proof, args, said, serving), WARM_UP)
        return self._at_size(route, args, tuple(self._padding.pad(args, route.rung)), serving)

    def _why_not_padded(self, route: Route, args: tuple[Any, ...]) -> str:
        seen = self._knowledge.any_call
        return self._padding.why_not_to(route.rung, args) or (self._padding.why_not_copied(args, seen) if seen else "")

    def _decided_together(self, said: step | None) -> bool:
        """Whether the sizes of this call may be others on other ranks, with one decision for all."""
        return self._agreement.is_group and said is not None and said.dispatch is not None

    def _needed_anywhere(self, plan: Plan, route: Route, args: tuple[Any, ...], said: step | None) -> Proof:
        """What must be proven on any rank: one whose call is not padded may share a decision with one whose call is."""
        if self._decided_together(said):
            return Proof(frozenset(plan.route.rung) | frozenset(route.rung), frozenset())
        return self._proofs.needed(route, args, said)

    def _prove(
        self, route: Route, proof: Proof, args: tuple[Any, ...], said: step | None, serving: Serving | None
    ) -> tuple[Any, ...]:
        """The first call that would be padded runs at its own size, and shows whether it may be."""
        captured = self._router.captured(route)
        seen = self._knowledge.any_call
        question = self._question("was there a call before", route)
        all_seen = all(self._agreement.gather(question, seen is not None, usual=True))
        if seen is None or not all_seen:
            seen, outputs = observe(self._program, args, self._device.device, captured)
            self._knowledge.note_call(seen)
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
            self._proofs.note(route, proof)
            if verdict.seen is not None:
                self._knowledge.note(route, verdict.seen)
                self._asked[route.key] = Asked.of(said, verdict.seen.decisive(self._step_dims))
        return verdict.outputs

    def _at_size(self, route: Route, args: tuple[Any, ...], padded: tuple[Any, ...], serving: Serving | None) -> Made:
        """Serve a call at the sizes of a route: capture if an earlier call has shown how values share memory;
        otherwise let this one show it."""
        captured = self._router.captured(route)
        with serving or contextlib.nullcontext():
            known = self._knowledge.of(route, padded, captured)
            question = self._question("is it warmed up", route)
            all_know = all(self._agreement.gather(question, known is not None, usual=True))
            if known is None or not all_know:
                outputs, known = self._knowledge.warm_up(route, padded, captured)
                made = Made(outputs, WARM_UP)
                self._asked[route.key] = Asked.of(current(), known.decisive(self._step_dims))
            else:
                is_warm = self._knowledge.is_warm(route)
                if serving is not None and not is_warm:
                    self._prepare_inputs(serving)
                reason = self._agreement.reason(
                    self._question("can its graph be given the step", route), self._why_not_held(known, serving)
                )
                if reason:
                    made = Made(self._program.run(*padded), reason)
                else:
                    made = self.capture.serve(route, known, padded, serving, is_warm=is_warm)
                if made.misjudged:
                    self._knowledge.doubt(route.key)
                if made.was_cold:
                    self._knowledge.warm_up_every_route()
        if route.rung:
            return made._replace(outputs=self._padding.hand_back(args, padded, made.outputs, known))
        return made

    def _why_not_held(self, known: Observation, serving: Serving | None) -> str:
        said = current()
        return "" if serving is None or said is None else serving.why_not_held(sorted(known.asked), said.inputs)

    def _prepare_inputs(self, serving: Serving) -> None:
        """Have the buffers that a warm-up would make: those that ops asked for on other routes."""
        said = current()
        given = {} if said is None else said.inputs.given
        for name in {name for other in self._servings.values() for name in other.names} & given.keys():
            serving.resolve(name, given[name])

    def _serving_of(self, route: Route, said: step | None) -> Serving | None:
        if said is None or not said.inputs:
            return None
        if route.key not in self._servings:
            self._servings[route.key] = Serving({**self._largest, **route.named}, self._step_dims, self._config.pad)
        serving = self._servings[route.key]
        with torch.no_grad():
            serving.refresh(said.inputs)
        return serving
