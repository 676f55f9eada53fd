"""Triton kernels launched without the JIT's way to them.

``kernel[grid](...)`` looks at every argument in Python to find what was compiled for arguments of that kind, which
takes the host longer than the launch itself. Here that is kept, and launched as Triton launches any kernel that was
compiled before: ``compiled[grid](*arguments, stream=...)`` in 3.6 to 3.9, the constants among the arguments.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch

from graphcap.passes.private import current_raw_stream

_ALIGNMENT = 16  #: bytes; Triton compiles another kernel for a pointer that is no multiple of it


class DirectLaunch:
    """Launches one kernel on CUDA tensors. The first launch of each kind goes through the JIT, which compiles it."""

    def __init__(self, jit: Any) -> None:
        """``jit``: what ``triton.jit`` has made, or something that is called like it."""
        self._jit = jit
        self._compiled: dict[Hashable, Any] = {}
        self._fits = True  # whether this Triton launches compiled kernels in the way that is written above

    def __call__(
        self, kind: Hashable, num_programs: int, tensors: Sequence[torch.Tensor], rest: Sequence[Any], **options: Any
    ) -> None:
        """Launch.

        Args:
            kind: all that decides what is compiled, but for the device and the alignment of the tensors: their dtypes,
                each integer and constant in ``rest``, and the options.
            num_programs: the grid.
            tensors: the first arguments of the kernel, all on one device.
            rest: its other arguments, constants included, in order.
            options: of the compilation, such as ``num_warps``.
        """
        index = tensors[0].get_device()
        if index != torch.cuda.current_device():
            with torch.cuda.device(index):
                self._launch((index, kind), num_programs, tensors, rest, options)
        else:
            self._launch((index, kind), num_programs, tensors, rest, options)

    def _launch(
        self,
        kind: tuple[int, Hashable],
        num_programs: int,
        tensors: Sequence[torch.Tensor],
        rest: Sequence[Any],
        options: dict[str, Any],
    ) -> None:
        grid, addresses, bits = (num_programs, 1, 1), [], 0
        for tensor in tensors:
            address = tensor.data_ptr()
            addresses.append(address)
            bits |= address
        aligned = not bits % _ALIGNMENT
        compiled = self._compiled.get(kind) if aligned else None
        if compiled is not None:
            try:
                compiled[grid](*addresses, *rest, stream=current_raw_stream(kind[0]))
                return
            except (AttributeError, TypeError):  # before the launch: it has other arguments in this Triton
                self._fits = False
                self._compiled.clear()
        made = self._jit[grid](*tensors, *rest, **options)
        if aligned and self._fits and hasattr(made, "__getitem__"):  # Triton's interpreter makes nothing
            self._compiled[kind] = made
