"""The proof that padding changes nothing: the padded call is run live, with other padding, before a plan relies on it.

A model may mix rows (a mean over the batch, one scale for a whole tensor) or depend on how many there are (a capacity,
a division by the size). Both show when the same real rows are run beside different padded ones, and in their exact
size. What a call writes is copied beforehand, so that all of it happens once.

The ranks of a process group take part in every run, also where their own call has the size of the rung: the runs hold
collectives. After each one they agree on whether there is another. Which step is to blame is not looked for there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from graphcap.cudagraph.agreement import Agreement, alone
from graphcap.cudagraph.padded.blame import first_departure, trace
from graphcap.cudagraph.padded.compare import departs, distance
from graphcap.cudagraph.padded.corner import around, corner
from graphcap.cudagraph.padded.padding import Padding
from graphcap.cudagraph.padded.scratch import Scratch, generator_states, same_random_numbers, state_bytes
from graphcap.cudagraph.private import storage_address
from graphcap.cudagraph.program import Program
from graphcap.cudagraph.recording.observe import Observation, observe
from graphcap.cudagraph.recording.recorded import describe, is_out_of_memory

_COPIES = 3  #: of what a call writes: as it was before, and after each of the two runs that are compared
_NOISE = 4.0  #: how much further two runs may be apart than two identical ones were

#: What padded rows of floats hold in a variant, at least; larger than what a real row brings, and far from overflow.
_LARGE = {torch.float16: 16.0, torch.float32: 1e3, torch.float64: 1e3, torch.bfloat16: 1e3}
_LARGE_OTHERS = 16.0


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a proof found.

    Attributes:
        outputs: of the call, run once at its exact sizes: the caller's.
        reason: why the program must not be padded, in one line; ``""`` where it may.
        is_open: whether the reason is a lack of memory for the proof, which says nothing about the program.
        seen: where it may, what a warm-up at the size of the rung shows.
    """

    outputs: tuple[Any, ...]
    reason: str
    seen: Observation | None = None
    is_open: bool = False


@dataclass(slots=True)
class _Result:
    """What one padded run left, by what a user would call it, cut to the real size."""

    values: dict[str, Any]


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

    The call's effects happen once: what the extra runs write are copies, and generators are put back. Live steps run
    several times.

    Args:
        program: to be padded.
        args: of a call for which ``padding.why_not_to(rung, args)`` has no reason.
        padding: of the program.
        rung: the sizes to pad to, by symbol; larger than the call's in at least one.
        seen: an earlier call, of any size.
        device: whose generator is watched, besides the CPU's.
        max_state_bytes: bytes that copies of the tensors which the call writes may take. Beyond it the verdict is a
            refusal.
        captured: the steps that may be captured, as for :func:`graphcap.cudagraph.recording.observe.observe`.
        beside: what surrounds each padded run: ops find the padded inputs of the step there.
        agreement: with whom the call is made; all of them prove at the same time.

    Raises:
        Exception: what the call itself raises, as it would without padding.
    """
    scratch, generators, reason, is_open = None, list[torch.Tensor](), "", False
    try:
        needed = _COPIES * state_bytes(program, seen, args)
        if needed <= max_state_bytes:
            scratch = Scratch(program, seen, args)
            generators = generator_states(device)
        else:
            reason = (
                f"the proof needs {needed} bytes for copies of what the call writes, {max_state_bytes} are allowed; "
                "graphcap.capture() tries again: call it at start-up, while caches are small"
            )
            is_open = True
    except Exception as error:  # nothing has run yet
        reason, is_open = f"its state cannot be copied: {describe(error)}", is_out_of_memory(error)
    reason, is_open = in_common(agreement, f"{program.name}: may the proof begin", reason, is_open)
    outputs = tuple(program.run(*args))
    if reason or scratch is None:
        return Verdict(outputs, reason, is_open=is_open)
    proof = _Proof(program, args, padding, rung, scratch, device, generators, captured, beside, agreement)
    reason = proof.reason(outputs)
    if reason:
        return Verdict(outputs, reason, is_open=proof.is_open)
    return Verdict(outputs, "", proof.seen)


def in_common(agreement: Agreement, question: str, reason: str, is_open: bool) -> tuple[str, bool]:
    """The first reason of any rank, and whether all that have one lack memory and no more."""
    common = agreement.reason(question, reason)
    return common, bool(common) and all(agreement.gather(question, is_open or not reason, usual=True))


def warm_up_padded(
    program: Program,
    args: Sequence[Any],
    padding: Padding,
    rung: Mapping[str, int],
    device: torch.device,
    captured: Collection[int] | None = None,
) -> tuple[Observation, tuple[Any, ...]]:
    """Serve a call live at the size of a rung: the warm-up of further rungs, once the program has been proven.

    Args:
        program: to be warmed up.
        args: of a call for which ``padding.why_not_to(rung, args)`` has no reason.
        padding: of the program.
        rung: the sizes to pad to, by symbol.
        device: where it will be captured.
        captured: the steps that may be.

    Returns:
        What a capture at this rung must know, and the outputs of the call at its real size.
    """
    padded = padding.pad(args, rung)
    seen, outputs = observe(program, padded, device, captured)
    return seen, padding.hand_back(args, padded, outputs, seen)


class _Proof:
    """The runs of one proof and what is compared."""

    def __init__(
        self,
        program: Program,
        args: Sequence[Any],
        padding: Padding,
        rung: Mapping[str, int],
        scratch: Scratch,
        device: torch.device,
        generators: Sequence[torch.Tensor],
        captured: Collection[int] | None,
        beside: Callable[[], AbstractContextManager[Any]],
        agreement: Agreement,
    ) -> None:
        self._captured, self._beside, self._agreement = captured, beside, agreement
        self._program, self._args, self._padding, self._rung = program, args, padding, rung
        self._scratch, self._device, self._generators = scratch, device, generators
        self.seen: Observation | None = None
        self.is_open = False  # whether only memory was missing
        self._padded = _Result({})
        self._found: dict[str, float] = {}  # what padded rows have an influence on, and how much

    def reason(self, outputs: Sequence[Any]) -> str:
        """Compare the call, which has run, with padded runs; ``""`` where they agree."""
        if reason := self._round(lambda: self._compare_sizes(outputs)):
            return reason
        for seed in (1, 2):
            if reason := self._round(lambda: self._vary(seed, outputs)):  # noqa: B023 - called at once
                return reason
            # Where two runs differ, so may two identical ones: a further run shows by how much.
            if any(
                self._agreement.gather(f"{self._program.name}: is there a difference", bool(self._found), usual=False)
            ) and (
                reason := self._round(lambda: self._compare_rows(seed, outputs))  # noqa: B023
            ):
                return reason
        return ""

    def _round(self, run: Callable[[], str]) -> str:
        """One more padded run on every rank: what speaks against padding on any of them."""
        is_open = False
        try:
            mine = run()
        except Exception as error:
            mine, is_open = f"the padded call fails: {describe(error)}", is_out_of_memory(error)
        question = f"{self._program.name}: is padding right"
        reason, self.is_open = in_common(self._agreement, question, mine, is_open)
        return reason

    def _compare_sizes(self, outputs: Sequence[Any]) -> str:
        truth = self._result(self._args, outputs)
        self._padded, misfit = self._run(None, outputs)
        if misfit:
            return misfit
        for name, value in self._padded.values.items():
            if _differs(value, truth.values[name], departs):
                step = self._blame(None, departs)
                return f"{step or name} depends on the padded size: {name} is not what it is without padding"
        return ""

    def _vary(self, seed: int, outputs: Sequence[Any]) -> str:
        varied, _ = self._run(seed, outputs)
        before = self._padded.values
        self._found = {
            name: far for name, value in varied.values.items() if (far := _distance(value, before[name])) > 0
        }
        return ""

    def _compare_rows(self, seed: int, outputs: Sequence[Any]) -> str:
        again, _ = self._run(None, outputs)
        noise = {name: _distance(again.values[name], self._padded.values[name]) for name in self._found}
        mixed = [name for name, far in self._found.items() if far > _NOISE * noise[name]]
        if not mixed:
            return ""
        step = self._blame(seed, lambda a, b: distance(a, b) > 0)
        return f"{step or mixed[0]} mixes rows: {mixed[0]} depends on what padded rows hold"

    def _arguments(self, seed: int | None) -> tuple[list[Any], list[Any]]:
        """Arguments of their own for one run, at their exact and at the padded size."""
        exact = self._scratch.arguments(self._args)
        padded = self._padding.pad(exact, self._rung)
        if seed is not None:
            for index in sorted(self._padding.inputs):
                if self._varies(index):
                    vary(padded[index], self._args[index].shape, seed * 1000 + index)
        return exact, padded

    def _varies(self, index: int) -> bool:
        fill = self._padding.fill(index)
        return not self._program.inputs[index].is_write_index and isinstance(fill, (bool, int, float)) and fill == 0

    def _run(self, seed: int | None, outputs: Sequence[Any]) -> tuple[_Result, str]:
        """One padded run: what it left, and how its outputs differ in kind from those of the call."""
        exact, padded = self._arguments(seed)
        with same_random_numbers(self._device, self._generators), torch.no_grad(), self._beside():
            self.seen, found = observe(self._program, padded, self._device, self._captured)
        misfit = self._misfit(padded, found) or self._other_form(exact, self._padding.cut(exact, found), outputs)
        for index in self._padding.inputs & set(self._scratch.written):
            exact[index] = corner(padded[index], self._args[index].shape)
        return self._result(exact, self._padding.cut(exact, found)), misfit

    def _misfit(self, padded: Sequence[Any], outputs: Sequence[Any]) -> str:
        memory = {storage_address(padded[index]): index for index in self._padding.inputs} | {0: -1}
        for number, (slot, value) in enumerate(zip(self._program.outputs, outputs, strict=True)):
            if isinstance(slot, int) and slot in self._padding.inputs:
                continue
            index = memory.get(storage_address(value), -1) if isinstance(value, torch.Tensor) else -1
            if index >= 0:
                return f"output {number} shares memory with {self._program.inputs[index].name}, which is padded"
        return ""

    def _other_form(self, exact: Sequence[Any], cut: Sequence[Any], outputs: Sequence[Any]) -> str:
        for number, (mine, true) in enumerate(zip(cut, outputs, strict=True)):
            one, other = _form(mine, exact), _form(true, self._args)
            if one != other:
                return f"output {number} has another form than without padding: {one}, expected {other}"
        if _sharing(cut) != _sharing(outputs):
            return "outputs share memory with each other in another way than without padding"
        return ""

    def _result(self, args: Sequence[Any], outputs: Sequence[Any]) -> _Result:
        values = {f"output {number}": value for number, value in enumerate(outputs)}
        values |= {f"what is left in {self._program.inputs[i].name}": args[i] for i in self._scratch.written}
        return _Result(values)

    def _blame(self, seed: int | None, apart: Callable[[torch.Tensor, torch.Tensor], bool]) -> str:
        """The first step whose real rows are apart; ``""`` where that cannot be told."""
        if self._agreement.is_group:  # more runs, that other ranks know nothing of
            return ""
        try:
            with torch.no_grad():
                return self._first_step(seed, apart)
        except Exception:  # out of memory, most likely: the name is a help, the refusal stands without it
            return ""

    def _first_step(self, seed: int | None, apart: Callable[[torch.Tensor, torch.Tensor], bool]) -> str:
        program = self._program
        with same_random_numbers(self._device, self._generators):
            exact = trace(program, self._scratch.arguments(self._args), None)
        with same_random_numbers(self._device, self._generators), self._beside():
            padded = trace(program, self._arguments(None)[1], exact)
        if seed is None:
            step = first_departure(program, padded, exact, apart, with_state=False)
            return step or first_departure(program, padded, exact, apart, with_state=True)
        with same_random_numbers(self._device, self._generators), self._beside():
            varied = trace(program, self._arguments(seed)[1], exact)
        return first_departure(program, varied, padded, apart, with_state=True)


def vary(tensor: torch.Tensor, size: torch.Size, seed: int) -> None:
    """Write other values around the corner: large floats of both signs, or what other rows hold."""
    generator = torch.Generator().manual_seed(seed)
    for dim, rest in around(tensor, size):
        if size[dim] == 0:
            continue
        if tensor.is_floating_point():
            real = corner(tensor, size).abs().float()
            largest = float(torch.where(real.isfinite(), real, 0).max()) if real.numel() else 0.0
            scale = max(4 * largest, _LARGE.get(tensor.dtype, _LARGE_OTHERS))
            scale = min(scale, torch.finfo(tensor.dtype).max / 64)
            rest.copy_((torch.rand(rest.shape, generator=generator) * 2 - 1) * scale)
        else:
            rows = torch.randint(size[dim], (rest.shape[dim],), generator=generator).to(tensor.device)
            rest.copy_(corner(tensor, [*tensor.shape[: dim + 1], *size[dim + 1 :]]).index_select(dim, rows))


def _differs(a: Any, b: Any, apart: Callable[[torch.Tensor, torch.Tensor], bool]) -> bool:
    return apart(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else bool(a != b)


def _distance(a: Any, b: Any) -> float:
    both = isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)
    return distance(a, b) if both else 0.0 if a == b else float("inf")


def _form(value: Any, args: Sequence[Any]) -> tuple[Any, ...]:
    """Dtype, size, strides, and the argument that it is or lies in, with how far from its start."""
    if not isinstance(value, torch.Tensor):
        return (type(value),)
    strides = tuple(stride for size, stride in zip(value.shape, value.stride(), strict=True) if size > 1)
    address = storage_address(value)
    tensors = [(index, arg) for index, arg in enumerate(args) if isinstance(arg, torch.Tensor)]
    inside = [
        (i, value.data_ptr() - arg.data_ptr()) for i, arg in tensors if address and storage_address(arg) == address
    ]
    return (
        value.dtype,
        tuple(value.shape),
        strides if value.numel() else (),
        inside[:1],
        [i for i, a in tensors if a is value],
    )


def _sharing(outputs: Sequence[Any]) -> list[int]:
    """For each output the first one in the same storage."""
    addresses = [storage_address(each) if isinstance(each, torch.Tensor) else 0 for each in outputs]
    return [addresses.index(address) if address else number for number, address in enumerate(addresses)]
