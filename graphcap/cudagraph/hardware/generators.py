"""Random generators: those whose draws may be captured besides the default one, and draws that are made twice.

A graph must know the generators that its kernels draw from before it is captured; torch adds the default one itself.

Not every torch lets a generator be referred to weakly (2.11 does not). So they are held, and let go by the first look
at them that finds nobody else holding them.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator

import torch

_lock = threading.Lock()
_registered: list[torch.Generator] = []

_in_a_list = [object()]
_HELD_ONCE = sys.getrefcount(_in_a_list[0])  #: the count of an object that one list holds, asked for in this way


def register_generator(generator: torch.Generator) -> None:
    """Let captured code draw from this generator: replays go on where it stands, and ``manual_seed`` on it is obeyed.

    Without that, a captured piece that uses a generator of its own fails to capture and runs live. It holds for
    captures that begin later, for as long as the generator is in use; the registration alone keeps it no longer than
    to the next capture or registration.

    Raises:
        TypeError: it is no ``torch.Generator``.
    """
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"register_generator: expected a torch.Generator, got {type(generator).__name__}")
    with _lock:
        _drop_unused()
        if not any(each is generator for each in _registered):
            _registered.append(generator)


def registered(device: torch.device) -> list[torch.Generator]:
    """The generators of this device that were registered and that somebody else holds."""
    if not _registered:  # asked for each graph that is captured
        return []
    with _lock:
        _drop_unused()
        held = list(_registered)
    return [each for each in held if each.device.type == device.type and each.device.index in (None, device.index)]


#: Generators, each with where it stands.
GeneratorStates = list[tuple[torch.Generator, torch.Tensor]]


def generator_states(device: torch.device) -> GeneratorStates:
    """Where the generators stand that code on a device draws from: the CPU's, the device's, and those registered.

    A CUDA device must have an index.
    """
    generators = [torch.default_generator]
    if device.type == "cuda":
        generators.append(torch.cuda.default_generators[device.index])
    return [(each, each.get_state()) for each in (*generators, *registered(device))]


def set_generator_states(states: GeneratorStates) -> None:
    """Put generators back to where they stood."""
    for generator, state in states:
        generator.set_state(state)


@contextlib.contextmanager
def same_random_numbers(device: torch.device, states: GeneratorStates | None = None) -> Iterator[None]:
    """What is drawn in this block is drawn again after it; within it the generators begin at ``states``, if given."""
    before = generator_states(device)
    set_generator_states(states or [])
    try:
        yield
    finally:
        set_generator_states(before)


def _drop_unused() -> None:
    for index in reversed(range(len(_registered))):
        if sys.getrefcount(_registered[index]) <= _HELD_ONCE:
            del _registered[index]
