"""The proof that padding changes nothing: the padded call is run live, with other padding, before a plan relies on it.

A model may mix rows (a mean over the batch, one scale for a whole tensor) or depend on how many there are (a capacity,
a division by the size). Both show when the same real rows are run beside different padded ones (``variation.py`` says
which), and in their exact size. The call itself runs once, on the caller's tensors; all else runs in other memory
(``scratch.py``).

Where part of the state is too large to be copied, the runs begin with another content of it, all of them with the same.
What the call itself left can then not be compared with, so that there is one more run at the exact size.

The ranks of a process group take part in every run, also where their own call has the size of the rung: the runs hold
collectives. After each one they agree on whether there is another. Which step is to blame is not looked for there.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from graphcap.cudagraph.agreement import Agreement, alone
from graphcap.cudagraph.hardware.generators import generator_states
from graphcap.cudagraph.padded.compare import departs, distance, is_finite
from graphcap.cudagraph.padded.padding import Padding
from graphcap.cudagraph.padded.scratch import Scratch, Undecided
from graphcap.cudagraph.padded.trial import Result, Trials
from graphcap.cudagraph.padded.variation import Content, alike, varied
from graphcap.cudagraph.program import Program
from graphcap.cudagraph.recording.observe import Observation
from graphcap.cudagraph.recording.recorded import describe, is_out_of_memory

_log = logging.getLogger("graphcap.cudagraph")

_Run = Callable[[], Result]

_NOISE = 4.0  #: how much further two runs may be apart than two identical ones were
_VARIED = varied(seed=1), varied(seed=2)
#: Which contents are compared: all rows hold one row, and only the real ones do.
_ALIKE = tuple((alike(3, real, padded=real), alike(3, real, padded=1 - real)) for real in (0, 1))
_REPEATS = 4  #: identical runs where two others differ: some kernels round differently in seven runs of ten, not in all


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a proof found.

    Attributes:
        outputs: of the call, run once at its exact sizes: the caller's.
        reason: why the program must not be padded, in one line; ``""`` where it may.
        is_open: whether the reason is that the proof was not possible as things are, for want of memory mostly, which
            says nothing about the program.
        seen: where it may, what a warm-up at the size of the rung shows.
    """

    outputs: tuple[Any, ...]
    reason: str
    seen: Observation | None = None
    is_open: bool = False


def prove(
    program: Program,
    args: Sequence[Any],
    padding: Padding,
    rung: Mapping[str, int],
    seen: Observation,
    device: torch.device,
    max_state_bytes: int,
    captured: Collection[int] | None = None,
    beside: Callable[[], AbstractContextManager[Any]] = nullcontext,
    agreement: Agreement = alone,
) -> Verdict:
    """Serve a call live, at its exact sizes, and find out whether it may be padded.

    The call's effects happen once: what the extra runs write is other memory, and generators are put back. Live steps
    run several times.

    Args:
        program: to be padded.
        args: of a call for which ``padding.why_not_to(rung, args)`` has no reason.
        padding: of the program.
        rung: the sizes to pad to, by symbol; larger than the call's in at least one.
        seen: an earlier call, of any size.
        device: whose generator is watched, besides the CPU's.
        max_state_bytes: bytes that memory in the place of what the call writes may take. Beyond it the verdict is a
            refusal.
        captured: the steps that may be captured, as for :func:`graphcap.cudagraph.recording.observe.observe`.
        beside: what surrounds each padded run: ops find the padded inputs of the step there.
        agreement: with whom the call is made; all of them prove at the same time.

    Raises:
        Exception: what the call itself raises, as it would without padding.
    """
    trials, is_complete, reason, is_open = None, True, "", False
    try:
        scratch = Scratch(program, seen, args, max_state_bytes)
        is_complete, generators = scratch.is_complete, generator_states(device)
        trials = Trials(program, args, padding, rung, scratch, device, generators, captured, beside)
    except Undecided as error:
        reason, is_open = str(error), True
    except Exception as error:  # nothing has run yet
        reason, is_open = f"its state cannot be copied: {describe(error)}", is_out_of_memory(error)
    reason, is_open = in_common(agreement, f"{program.name}: may the proof begin", reason, is_open)
    outputs = tuple(program.run(*args))
    if reason or trials is None:
        return Verdict(outputs, reason, is_open=is_open)
    proof = _Proof(trials, outputs, agreement)
    stood_in = agreement.gather(f"{program.name}: is state stood in for", not is_complete, usual=False)
    reason = proof.reason(any(stood_in))
    if reason:
        return Verdict(outputs, reason, is_open=proof.is_open)
    return Verdict(outputs, "", trials.seen)


def in_common(agreement: Agreement, question: str, reason: str, is_open: bool) -> tuple[str, bool]:
    """The first reason of any rank, and whether it is open on all that have one."""
    common = agreement.reason(question, reason)
    return common, bool(common) and all(agreement.gather(question, is_open or not reason, usual=True))


class _Proof:
    """What is run one after the other, and compared.

    Attributes:
        is_open: whether the reason says nothing about the program.
    """

    def __init__(self, trials: Trials, outputs: Sequence[Any], agreement: Agreement) -> None:
        self.is_open = False
        self._trials, self._outputs, self._agreement = trials, outputs, agreement
        self._name = trials.program.name
        self._truth: Result = trials.call(outputs)
        self._padded: Result = {}
        self._found: dict[str, float] = {}  # what padded rows have an influence on, and how much

    def reason(self, stood_in: bool) -> str:
        """What speaks against padding, ``""`` where nothing does. ``stood_in``: runs begin with another state."""
        if stood_in and (reason := self._round(self._run_exact)):
            return reason
        if reason := self._round(self._compare_sizes):
            return reason
        trials, outputs = self._trials, self._outputs
        for content in _VARIED:
            other, again = partial(trials.other, content, outputs), partial(trials.other, None, outputs)
            if reason := self._mixes(other, again, partial(trials.first_departure, content, _is_apart)):
                return reason
        for base, content in _ALIKE:
            if self._is_possible(base):
                other, again = partial(trials.alike_other, content), partial(trials.alike_other, base)
                if reason := self._mixes(other, again, partial(trials.first_apart, base, content)):
                    return reason
        return ""

    def _mixes(self, other: _Run, again: _Run, name: Callable[[], str]) -> str:
        """Whether a run differs from the base by more than another one that is like the base."""
        if reason := self._round(lambda: self._compare(other)):
            return reason
        for _ in range(_REPEATS):  # where two runs differ, so may two identical ones: further runs show by how much
            if not self._anywhere_found():
                return ""
            if reason := self._round(lambda: self._repeat(again)):
                return reason
        return self._round(lambda: self._told(name)) if self._anywhere_found() else ""

    def _round(self, run: Callable[[], str]) -> str:
        """One more run on every rank: what speaks against padding on any of them."""
        is_open = False
        try:
            mine = run()
        except Undecided as error:
            mine, is_open = str(error), True
        except Exception as error:
            mine, is_open = f"the padded call fails: {describe(error)}", is_out_of_memory(error)
        reason, self.is_open = in_common(self._agreement, f"{self._name}: is padding right", mine, is_open)
        return reason

    def _run_exact(self) -> str:
        try:
            self._trials.find_what_was_written()
            self._truth = self._trials.exact()
        except Undecided:
            raise
        except Exception as error:
            raise Undecided(f"the call fails where its state is stood in for: {describe(error)}") from error
        for number, value in enumerate(self._outputs):
            made = self._truth[f"output {number}"]
            if isinstance(made, torch.Tensor) and not is_finite(made) and is_finite(value):
                raise Undecided(f"output {number} is not finite where the call's state is stood in for")
        return ""

    def _compare_sizes(self) -> str:
        self._padded, misfit = self._trials.base(self._outputs)
        if misfit:
            return misfit
        for name, value in self._padded.items():
            if _differs(value, self._truth[name]):
                step = self._blame(partial(self._trials.first_departure, None, departs))
                return f"{step or name} depends on the padded size: {name} is not what it is without padding"
        self._truth = {}
        return ""

    def _is_possible(self, base: Content) -> bool:
        """Begin with real rows that are made up. Where the model fails with these, they show nothing."""
        if not self._trials.can_be_drawn:
            return False
        try:
            self._padded = self._trials.alike_base(base)
            failed = ""
        except Exception as error:
            failed = describe(error)
            _log.debug("%s: no proof with rows that are alike: %s", self._name, failed)
        question = f"{self._name}: do rows that are alike fail"
        return not any(self._agreement.gather(question, bool(failed), usual=False))

    def _compare(self, run: _Run) -> str:
        other, base = run(), self._padded
        common = [name for name in other if name in base]
        self._found = {name: far for name in common if (far := _distance(other[name], base[name])) > 0}
        return ""

    def _anywhere_found(self) -> bool:
        question = f"{self._name}: is there a difference"
        return any(self._agreement.gather(question, bool(self._found), usual=False))

    def _repeat(self, run: _Run) -> str:
        """What an identical run explains is no finding."""
        again = run()
        noise = {name: _distance(again[name], self._padded[name]) for name in self._found if name in again}
        self._found = {name: far for name, far in self._found.items() if far > _NOISE * noise.get(name, 0.0)}
        return ""

    def _told(self, name: Callable[[], str]) -> str:
        if not self._found:
            return ""  # another rank's has
        seen = next(iter(self._found))
        return f"{self._blame(name) or 'some step'} mixes rows: {seen} depends on what padded rows hold"

    def _blame(self, name: Callable[[], str]) -> str:
        """The step that is to blame; ``""`` where that cannot be told."""
        if self._agreement.is_group:  # more runs, that other ranks know nothing of
            return ""
        try:
            return name()
        except Exception:  # out of memory, most likely: the name is a help, the refusal stands without it
            return ""


def _is_apart(a: torch.Tensor, b: torch.Tensor) -> bool:
    return distance(a, b) > 0


def _differs(a: Any, b: Any) -> bool:
    both = isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)
    return departs(a, b) if both else bool(a != b)


def _distance(a: Any, b: Any) -> float:
    both = isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)
    return distance(a, b) if both else 0.0 if a == b else float("inf")
