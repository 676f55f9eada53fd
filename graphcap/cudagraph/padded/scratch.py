"""Running a program again without the caller seeing it: other memory in the place of all that it writes.

What is small is copied. What is too large for that is *stood in for*: by memory of the same size in which the pages
that the call writes are real and all others share a few (:mod:`~graphcap.cudagraph.hardware.thin`). Which pages those
are is seen at the call itself, by digests before and after it. They hold random numbers, not what the caller's do, but
at the edges: runs that begin with the same can be compared, whatever it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from graphcap.cudagraph.hardware.thin import Filler, Pages, ThinMemory, pages_of
from graphcap.cudagraph.padded.digest import digests
from graphcap.cudagraph.padded.state import State, edges_of, states_of
from graphcap.cudagraph.private import over_storage
from graphcap.cudagraph.program import Program
from graphcap.cudagraph.recording.observe import Observation

_COPIES = 3  #: of what is copied: as it was before the call, and on the two stages
_NUM_STAGES = 2
_MIN_PAGES = 4  #: a smaller piece of memory is copied
_MAX_FILLER_PAGES = 16  #: in one block; all blocks of a filler are less than twice as much


class Undecided(Exception):
    """A proof is not possible as things are, for want of memory mostly. Nothing is known against the program."""


class Scratch:
    """The state of a call: the memory of all arguments that the program writes.

    It is made before the call. :meth:`look_again` comes after it, then the :meth:`stage`.

    Attributes:
        written: the arguments that lie in this memory, sorted.
        is_complete: whether a run begins with what the call began with. Otherwise it begins with something else, the
            same every time.
    """

    def __init__(self, program: Program, seen: Observation, args: Sequence[Any], max_bytes: int) -> None:
        """Copy what there is room for.

        Args:
            program: whose call it is.
            seen: an earlier call of it.
            args: of the call.
            max_bytes: for all copies and stages together.

        Raises:
            Undecided: part of the state is too large to be copied, and cannot be stood in for.
            Exception: what torch raises when it copies.
        """
        self._max_bytes = max_bytes
        states = states_of(program, seen, args)
        self.written = sorted(index for state in states for index in state.arguments)
        self._copied, self._thin = _divided(states, max_bytes)
        self._pages: dict[torch.device, Pages] = {}
        for state in self._thin:
            pages = self._pages_for(state)
            if state.nbytes < _MIN_PAGES * pages.page_bytes:
                raise Undecided(_too_little(_COPIES * sum(each.nbytes for each in states), max_bytes))
            state.digests = digests(state.memory, pages.page_bytes)
            with torch.inference_mode(False), torch.no_grad():
                state.edges = [edge for index in state.arguments for edge in edges_of(index, args[index])]
        with torch.inference_mode(False), torch.no_grad():
            for state in self._copied:
                state.before = state.memory.clone()
        self.is_complete = not self._thin

    def look_again(self) -> None:
        """See which pages the call has written.

        Raises:
            Undecided: more than there is room for.
        """
        needed = _COPIES * sum(state.nbytes for state in self._copied)
        kinds = set[tuple[torch.device, torch.dtype | None]]()
        for state in self._thin:
            pages = self._pages_for(state)
            assert state.digests is not None
            differs = digests(state.memory, pages.page_bytes).ne(state.digests)
            state.digests, state.touched = None, differs.nonzero().flatten().tolist()
            needed += _NUM_STAGES * len(state.touched) * pages.page_bytes
            needed += sum(edge.copy.nbytes for edge in state.edges)
            if (kind := _kind(state)) not in kinds:
                kinds.add(kind)
                needed += _NUM_STAGES * 3 * self._filler_pages(pages) * pages.page_bytes
        if needed > self._max_bytes:
            raise Undecided(_too_little(needed, self._max_bytes))

    def stage(self) -> Stage:
        """Memory for one run at a time. At most two are in use.

        Raises:
            torch.OutOfMemoryError: there is no room after all.
        """
        fillers: dict[Any, tuple[Filler, torch.Tensor]] = {}
        thin = []
        for state in self._thin:
            pages, (device, dtype) = self._pages_for(state), _kind(state)
            if (device, dtype) not in fillers:
                num_pages = self._filler_pages(pages)
                content = _content(num_pages, pages.page_bytes, device, dtype)
                fillers[device, dtype] = Filler(pages, num_pages), content
            filler, content = fillers[device, dtype]
            thin.append((state, ThinMemory(state.nbytes, state.touched, filler), content))
        return Stage(self._copied, thin)

    def _pages_for(self, state: State) -> Pages:
        device = state.memory.device
        if device not in self._pages:
            try:
                self._pages[device] = pages_of(device)
            except RuntimeError as error:
                raise Undecided(f"{_too_little(state.nbytes, self._max_bytes)} ({error})") from error
        return self._pages[device]

    def _filler_pages(self, pages: Pages) -> int:
        """So many that few blocks have to be mapped, within a quarter of the room."""
        return min(_MAX_FILLER_PAGES, max(1, self._max_bytes // (12 * _NUM_STAGES * pages.page_bytes)))


class Stage:
    """Memory in the place of the state. What a run left in it stays until the next one begins."""

    def __init__(self, copied: Sequence[State], thin: Sequence[tuple[State, ThinMemory, torch.Tensor]]) -> None:
        self._copied, self._thin = copied, thin
        with torch.inference_mode(False):
            self._copies = [torch.empty_like(state.memory) for state in copied]

    def arguments(self, args: Sequence[Any]) -> list[Any]:
        """The arguments of the call, those that are written in this memory, as every run finds them."""
        again = list(args)
        with torch.inference_mode(False), torch.no_grad():
            for state, copy in zip(self._copied, self._copies, strict=True):
                assert state.before is not None
                copy.copy_(state.before)
                _put(again, state, copy)
            for state, memory, content in self._thin:
                memory.fill(content)
                _put(again, state, memory.bytes)
            for state, _, _ in self._thin:
                for edge in state.edges:
                    again[edge.argument][edge.index].copy_(edge.copy)
        return again


def _put(args: list[Any], state: State, memory: torch.Tensor) -> None:
    for index, offset in state.arguments.items():
        args[index] = over_storage(memory.untyped_storage(), args[index], offset)


def _divided(states: Sequence[State], max_bytes: int) -> tuple[list[State], list[State]]:
    """What is copied, and what is stood in for: nothing if it can be helped, otherwise the largest."""
    by_size = sorted(states, key=lambda state: state.nbytes)
    thin: list[State] = []
    while _COPIES * sum(state.nbytes for state in by_size) > (max_bytes // 2 if thin else max_bytes):
        thin.append(by_size.pop())
    if any(not state.can_be_stood_in_for() for state in thin):
        raise Undecided(_too_little(_COPIES * sum(state.nbytes for state in states), max_bytes))
    return by_size, thin


def _kind(state: State) -> tuple[torch.device, torch.dtype | None]:
    """Where it is, and the format of its numbers; ``None`` where there are several or bytes may be part of others."""
    dtype = next(iter(state.dtypes)) if len(state.dtypes) == 1 else torch.uint8
    return state.memory.device, dtype if dtype.itemsize > 1 else None


def _content(num_pages: int, page_bytes: int, device: torch.device, dtype: torch.dtype | None) -> torch.Tensor:
    """What pages hold when a run begins, uint8 ``[num_pages, page_bytes]``: numbers that are neither 0 nor large."""
    with torch.inference_mode(False):
        generator = torch.Generator(device).manual_seed(0)
        if dtype is None:  # small and finite in every format of floats
            size = num_pages, page_bytes
            return torch.randint(1, 8, size, generator=generator, device=device, dtype=torch.uint8)
        numbers = torch.rand(num_pages, page_bytes // dtype.itemsize, generator=generator, device=device)
        return (numbers * 2 - 1).to(dtype).view(torch.uint8)


def _too_little(needed: int, max_bytes: int) -> str:
    return (
        f"the proof needs {needed} bytes for copies of what the call writes, {max_bytes} are allowed; "
        "graphcap.capture() tries again: give it calls that write little, such as indices that point nowhere"
    )
