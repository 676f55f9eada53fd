"""What the simulated device records, and how it replays that: pools whose blocks can be poisoned, tapes of calls."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from graphcap.cudagraph.hardware import hooks
from graphcap.cudagraph.hardware.device import UnjoinedStreamError
from graphcap.cudagraph.hardware.generators import registered
from graphcap.cudagraph.private import over_storage, storage_address, weak_view

_SYNCS = {"_local_scalar_dense", "item", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2", "unique_dim"}
_MASKS = (torch.bool, torch.uint8)  # an index of this dtype makes a result whose size is a value


class SimulatedCaptureError(RuntimeError):
    """The recorded function did what a graph capture does not allow."""


class _RefuseHostSyncs(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masked = name == "index" and any(each is not None and each.dtype in _MASKS for each in args[1])
        if func.namespace == "aten" and (name in _SYNCS or masked):
            raise SimulatedCaptureError(f"{func} waits for the device: not allowed inside a graph capture (simulated)")
        return func(*args, **(kwargs or {}))


class Block:
    """The memory of one recorded result."""

    def __init__(self, result: torch.Tensor) -> None:
        """Take a copy of the result's storage, as poison."""
        self.storage = result.untyped_storage().clone()
        size = self.storage.nbytes() // result.element_size()
        with torch.inference_mode(False):
            empty = torch.empty(0, dtype=result.dtype)
            self._values = empty.set_(self.storage, 0, (size,), (1,))
        self._poisoned = False
        self.poison()

    def poison(self) -> None:
        """Make every value one that shows: NaN, the extreme integer, the opposite boolean."""
        if self._poisoned:
            return
        dtype = self._values.dtype
        if dtype is torch.bool:
            self._values.logical_not_()
        elif dtype.is_floating_point or dtype.is_complex:
            self._values.view(torch.uint8).fill_(255)
        else:
            info = torch.iinfo(dtype)
            self._values.fill_(info.min or info.max)
        self._poisoned = True

    def write(self, storage: torch.UntypedStorage) -> None:
        """Take over the bytes of a result of the same size."""
        if storage.nbytes() != self.storage.nbytes():
            raise SimulatedCaptureError(
                f"a captured call made {storage.nbytes()} bytes where it made {self.storage.nbytes()} when recorded: "
                "its shapes depend on something that the graph key does not fix"
            )
        self.storage.copy_(storage)
        self._poisoned = False


class SimulatedPool:
    """The blocks of all recordings that are alive, by address.

    Attributes:
        is_spoilt: whether a recording in it could not be ended; torch lets no other one begin in such a pool.
    """

    def __init__(self, check_room: Callable[[int], None] = lambda nbytes: None) -> None:
        """Open a pool. ``check_room(nbytes)`` raises when so many more bytes do not fit on the device."""
        self.blocks: weakref.WeakValueDictionary[int, Block] = weakref.WeakValueDictionary()
        self.is_spoilt = False
        self._check_room = check_room

    def block(self, result: torch.Tensor) -> Block:
        """A block for a result.

        Raises:
            torch.OutOfMemoryError: the device is full.
        """
        self._check_room(result.untyped_storage().nbytes())
        block = Block(result)
        self.blocks[block.storage.data_ptr()] = block
        return block

    def nbytes(self) -> int:
        """Of all blocks."""
        return sum(block.storage.nbytes() for ref in self.blocks.valuerefs() if (block := ref()) is not None)


class SimulatedStream:
    """A side stream, by name only: what runs "on it" runs at once. A recording it was forked in must see it joined."""

    def fork(self) -> None:
        """``side.wait_stream(current)``: from here on it belongs to the recording in progress, if there is one."""
        if _thread.recording is not None:
            _thread.recording.forked.add(self)

    def join(self) -> None:
        """``current.wait_stream(side)``."""
        if _thread.recording is not None:
            _thread.recording.forked.discard(self)


class SimulatedSegment:
    """A finished recording."""

    def __init__(self, tape: list[Callable[[], None]], blocks: list[Block]) -> None:
        self._tape = tape
        self.blocks = blocks

    def replay(self) -> None:
        """Call everything again, at the recorded addresses."""
        with torch.inference_mode(False), torch.no_grad():
            for entry in self._tape:
                entry()


class SimulatedRecording:
    """A recording in progress.

    Calls run on shadows: copies of the storages they touch, which carry the true values from one recorded call to the
    next, so that a function which checks its indices sees sensible ones.
    """

    def __init__(self, pool: SimulatedPool, released: Sequence[torch.Tensor]) -> None:
        if pool.is_spoilt:
            raise SimulatedCaptureError("this pool takes no recording: one in it could not be ended (simulated)")
        self.forked: set[SimulatedStream] = set()
        self._pool = pool
        self._tape: list[Callable[[], None]] = []
        self._blocks: list[Block] = []
        self._shadows: dict[int, torch.UntypedStorage] = {}
        self._originals: dict[int, torch.UntypedStorage] = {}
        self._generator_states = [(each, each.get_state()) for each in _generators()]
        for tensor in released:
            self.release(tensor)
        _thread.recording = self

    def call(self, fn: Callable[..., Any], args: Sequence[Any]) -> Sequence[Any]:
        """See :class:`graphcap.cudagraph.hardware.device.Recording`."""
        frozen = [weak_view(arg) if isinstance(arg, torch.Tensor) else arg for arg in args]
        with _RefuseHostSyncs():
            results = fn(*map(self._shadow, frozen))
        sources: dict[int, tuple[Block, int]] = {}
        held = [self._hold(position, result, sources) for position, result in enumerate(results)]
        self._blocks += [block for block, _ in sources.values()]

        def again() -> None:
            fresh = fn(*frozen)
            for block, position in sources.values():
                block.write(fresh[position].untyped_storage())

        self._tape.append(again)
        return held

    def _shadow(self, arg: Any) -> Any:
        address = storage_address(arg) if isinstance(arg, torch.Tensor) else 0
        if not address:
            return arg
        if address not in self._shadows:
            self._keep_shadow(arg.untyped_storage(), arg.untyped_storage().clone())
        return over_storage(self._shadows[address], arg, arg.storage_offset())

    def _keep_shadow(self, original: torch.UntypedStorage, shadow: torch.UntypedStorage) -> None:
        self._shadows[original.data_ptr()] = shadow
        self._originals[shadow.data_ptr()] = original

    def _hold(self, position: int, result: Any, sources: dict[int, tuple[Block, int]]) -> Any:
        """The recorded stand-in for a result: on the argument it views, or on poison of its own."""
        address = storage_address(result) if isinstance(result, torch.Tensor) else 0
        if not address or result.device.type != "cpu":
            return result
        if address not in self._originals:
            block = self._pool.block(result)
            sources[address] = block, position
            self._keep_shadow(block.storage, result.untyped_storage())
        return over_storage(self._originals[address], result, result.storage_offset())

    def release(self, tensor: torch.Tensor) -> None:
        """See :class:`graphcap.cudagraph.hardware.device.Recording`."""
        block = self._pool.blocks.get(storage_address(tensor))
        if block is not None:
            self._tape.append(block.poison)

    def end(self) -> SimulatedSegment:
        """See :class:`graphcap.cudagraph.hardware.device.Recording`."""
        hooks.capture_exit.run()
        if self.forked:
            self._pool.is_spoilt = True
            raise UnjoinedStreamError("a side stream that was forked inside of the capture is not joined when it ends")
        self._close()
        return SimulatedSegment(self._tape, self._blocks)

    def abort(self) -> None:
        """See :class:`graphcap.cudagraph.hardware.device.Recording`."""
        self._close()

    def _close(self) -> None:
        for generator, state in self._generator_states:
            generator.set_state(state)
        _thread.recording = None


class _Thread(threading.local):
    recording: SimulatedRecording | None = None  # the one in progress


_thread = _Thread()


def _generators() -> list[torch.Generator]:
    return [torch.default_generator, *registered(torch.device("cpu"))]
