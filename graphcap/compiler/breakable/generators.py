"""Where the random number generators of all devices stand: a function may draw on any of them."""

from __future__ import annotations

import torch

from graphcap.cudagraph.hardware import generators
from graphcap.cudagraph.hardware.generators import GeneratorStates


def generator_states() -> GeneratorStates:
    """Of the CPU, of each GPU if any is in use, and of those that were registered."""
    devices = [torch.device("cpu")]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    found = [each for device in devices for each in generators.generator_states(device)]
    return list({id(generator): (generator, state) for generator, state in found}.values())
