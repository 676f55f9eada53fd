"""Which symbols of a program may be padded, as far as its form tells. Nothing is run for it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping

from graphcap.cudagraph.padded.corner import Fill, declared_fill
from graphcap.cudagraph.padded.sizes import held_by, scalars_that_tell, symbols_in
from graphcap.cudagraph.program import InputKind, InputSpec, Program, Size


def declared_names(program: Program) -> dict[str, str]:
    """The symbols that declared dims follow, each with the first name."""
    names: dict[str, str] = {}
    for spec in program.inputs:
        for dim, name in spec.dim_names.items():
            if dim < len(spec.sizes) and isinstance(size := spec.sizes[dim], Size):
                names.setdefault(size.symbol, name)
    return names


def tensors(program: Program) -> Iterator[tuple[int, InputSpec]]:
    """The inputs that are tensors."""
    return ((index, spec) for index, spec in enumerate(program.inputs) if spec.kind is not InputKind.SCALAR)


def why_not_padded(program: Program, symbol: str, fills: Mapping[str, Fill]) -> str:
    """Why a symbol is not padded; ``""`` where nothing in the form of the program forbids it.

    Args:
        program: of any size.
        symbol: a declared one.
        fills: what ``pad`` says.
    """
    checks: tuple[Callable[[], str], ...] = (
        lambda: _why_not_steps(program),
        lambda: _why_not_scalars(program, symbol),
        lambda: _why_not_tensors(program, symbol, fills),
        lambda: _why_not_outputs(program, symbol),
    )
    return next((reason for check in checks if (reason := check())), "")


def _why_not_steps(program: Program) -> str:
    for step in program.steps:
        if step.moves_on:
            return f"{step.name} changes what it holds in every call (a counter?), so that a proof cannot repeat it"
    return ""


def _why_not_scalars(program: Program, symbol: str) -> str:
    for spec in program.inputs:
        if spec.kind is not InputKind.SCALAR or symbol not in re.findall(r"[A-Za-z_]\w*", spec.symbol or ""):
            continue
        if not isinstance(held_by(spec), Size):
            return f"{spec.name} is {spec.symbol}, which does not follow it alone"
        if not spec.in_key:
            return f"{spec.name} is not part of the graph key"
    known = any(size.symbol == symbol for size in scalars_that_tell(program).values())
    return "" if known else "no argument tells its value"


def _why_not_tensors(program: Program, symbol: str, fills: Mapping[str, Fill]) -> str:
    for _, spec in tensors(program):
        for dim, size in enumerate(spec.sizes):
            if size is None:
                return f"{spec.name} dim {dim} has a size that follows more than one symbol"
            if isinstance(size, Size) and size.symbol == symbol and dim not in spec.dim_names:
                return f"{spec.name} dim {dim} follows it and is not declared in dynamic_arg_dims"
        carries = symbol in symbols_in(spec.sizes)
        if not carries and symbol in symbols_in(spec.strides):
            return f"the strides of {spec.name} follow it"
        if not carries:
            continue
        if spec.is_parameter:
            return f"{spec.name} is a parameter"
        if any(stride is None or stride == 0 for stride in spec.strides):
            return f"{spec.name} has strides that a buffer cannot have"
        if spec.is_write_index and declared_fill(fills, spec.name) is None:
            return f"{spec.name} says where something is written: pad={{{spec.name!r}: ...}} must say with what"
    return ""


def _why_not_outputs(program: Program, symbol: str) -> str:
    writer = {slot: step for step in program.steps for slot in step.writes}
    for number, (slot, sizes) in enumerate(zip(program.outputs, program.output_sizes, strict=False)):
        if isinstance(slot, int) and slot in writer and None in sizes and symbol in writer[slot].symbols:
            return f"output {number} has a size that does not follow one symbol"
    if len(program.output_sizes) != len(program.outputs):
        return "nothing is known about the sizes of the outputs"
    return ""
