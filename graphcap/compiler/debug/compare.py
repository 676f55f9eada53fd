"""A piece on random inputs, eager against compiled: what the ``repro.py`` files of a dump run.

Inputs are made from recorded shapes and strides, never from a user's data.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from graphcap.compiler.backend import graphcap
from graphcap.compiler.region import all_regions

#: The largest difference that passes, relative to the largest value of the tensor, by dtype.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.complex64: 1e-4, torch.complex128: 1e-9}
#: For bfloat16, float16 and narrower: Inductor keeps float32 between fused operations, eager rounds after each.
NARROW_TOLERANCE = 3e-2


def tensor(
    shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype, device: str, offset: int = 0
) -> torch.Tensor:
    """Random values at a recorded layout.

    Floats are normal; integers are 0 or 1, so that they are valid as indices; booleans are either.

    Args:
        shape: sizes.
        stride: in elements; 0 repeats memory, as ``expand`` does.
        dtype: any.
        device: ``"cpu"``, ``"cuda:0"``...
        offset: storage offset in elements.
    """
    needed = offset + 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    if 0 in shape:
        needed = offset
    if dtype.is_floating_point or dtype.is_complex:
        source = dtype if dtype.is_complex else torch.float64 if dtype is torch.float64 else torch.float32
        storage = torch.randn(needed, dtype=source).to(dtype)
    else:
        storage = torch.randint(0, 2, (needed,)).to(dtype)
    return storage.to(device).as_strided(tuple(shape), tuple(stride), offset)


def distinct(indices: torch.Tensor) -> torch.Tensor:
    """A vector of indices with 0, 1, 2... in random order for values: as places to write, each is written once."""
    order = torch.randperm(len(indices)).to(indices)
    return indices.copy_(order) if indices.stride(0) else indices


def main(
    piece: torch.nn.Module,
    call: Callable[..., Sequence[Any]],
    make_inputs: Callable[[], Sequence[Any]],
    *,
    dynamic: Mapping[int, Sequence[int]],
    options: Mapping[str, Any],
    autocast: Mapping[str, torch.dtype],
) -> int:
    """Run a piece both ways, print the differences.

    Args:
        piece: the piece as a module.
        call: ``call(piece, *inputs)`` runs it, taking sizes from the tensors.
        make_inputs: builds the inputs, from torch's generator.
        dynamic: per input position the dims that were symbolic.
        options: how it was compiled; fields of ``Config``.
        autocast: device type -> dtype, where autocast was on.

    Returns:
        The exit status: 0 when every difference is within the tolerance, 1 when one is not, 2 when nothing was
        compared.
    """
    arguments = _arguments()
    torch.manual_seed(arguments.seed)
    inputs = make_inputs()
    with contextlib.ExitStack() as stack, torch.no_grad():
        for device, dtype in autocast.items():
            stack.enter_context(torch.autocast(device, dtype))
        try:
            expected = _run(call, piece, inputs, arguments.seed)
        except IndexError as error:
            hint = "give it other values in make_inputs()"
            print(f"nothing was compared: an integer input is no index here ({error}); {hint}")  # noqa: T201
            return 2
        for position, dims in dynamic.items():
            for dim in dims:
                torch._dynamo.maybe_mark_dynamic(inputs[position], dim)
        compiled = torch.compile(call, backend=graphcap, options=dict(options))
        actual = _run(compiled, piece, inputs, arguments.seed)
    problem = _not_compiled()
    if problem:
        print(f"nothing was compared: {problem}")  # noqa: T201
        return 2
    unwritten = [f"input {i}" for i, value in enumerate(inputs) if _untouched(value, expected, actual, f"input {i}")]
    return _report({k: v for k, v in expected.items() if k not in unwritten}, actual, arguments.tolerance)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Run one piece eager and compiled on random inputs and compare.")
    parser.add_argument("--tolerance", type=float, help="largest relative difference that passes (default: by dtype)")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(sys.argv[1:])


def _run(call: Callable[..., Any], piece: torch.nn.Module, inputs: Sequence[Any], seed: int) -> dict[str, Any]:
    """The results, and the inputs afterwards, as a piece may write into them; on copies, so both runs start equal."""
    copies = [_copy(value) if isinstance(value, torch.Tensor) else value for value in inputs]
    torch.manual_seed(seed)
    outputs = call(piece, *copies)
    results = {f"output {i}": value for i, value in enumerate(outputs)}
    return results | {f"input {i}": value for i, value in enumerate(copies)}


def _untouched(value: Any, expected: Mapping[str, Any], actual: Mapping[str, Any], name: str) -> bool:
    """Whether neither run wrote into an input."""
    if not isinstance(value, torch.Tensor):
        return True
    return difference(value, expected[name]) == (0.0, 0.0) == difference(value, actual[name])


def _copy(value: torch.Tensor) -> torch.Tensor:
    """A tensor of its own storage with the same layout, overlapping memory included, and the same marks."""
    storage = value.untyped_storage().clone()
    copy = torch.empty(0, dtype=value.dtype, device=value.device)
    copy.set_(storage, value.storage_offset(), value.size(), value.stride())
    vars(copy).update(vars(value))
    return copy


def _not_compiled() -> str:
    """Why a comparison would only compare eager with eager, ``""`` when something was compiled."""
    regions = all_regions()
    bypassed = next((region.bypass for region in regions if region.bypass), "")
    if bypassed or not regions:
        return bypassed or "torch.compile did not call the backend"
    pieces = [piece for region in regions for piece in region.pieces]
    failed = [piece for piece in pieces if piece.origin == "failed"]
    if failed:
        return f"{failed[0].name} could not be compiled: {failed[0].note}"
    if not any(piece.origin == "compiled" for piece in pieces):
        return "this piece is not compiled: it runs as it is"
    return ""


def _report(expected: Mapping[str, Any], actual: Mapping[str, Any], tolerance: float | None) -> int:
    """Print one line per tensor; the status says whether all are near enough."""
    far = False
    for name, eager in expected.items():
        compiled = actual[name]
        if not isinstance(eager, torch.Tensor):
            continue
        absolute, relative = difference(eager, compiled)
        allowed = allowed_difference(eager.dtype) if tolerance is None else tolerance
        wrong = not relative <= allowed
        far = far or wrong
        what = f"{name:<22} {eager.dtype!s:<15} {list(eager.shape)!s:<18}"
        facts = f"max abs {absolute:.3e}  max rel {relative:.3e}  (allowed {allowed:.0e})"
        print(f"{what} {facts}{'  FAR' if wrong else ''}")  # noqa: T201
    print("differs" if far else "agrees")  # noqa: T201
    return int(far)


def allowed_difference(dtype: torch.dtype) -> float:
    """The relative difference that passes for results of this dtype; integers and booleans must be equal."""
    if not (dtype.is_floating_point or dtype.is_complex):
        return 0.0
    return TOLERANCES.get(dtype, NARROW_TOLERANCE)


def difference(eager: torch.Tensor, compiled: torch.Tensor) -> tuple[float, float]:
    """The largest absolute difference, and the same relative to the largest value of ``eager``.

    Infinite where shape, dtype or the place of a NaN or an infinity differ.
    """
    if eager.shape != compiled.shape or eager.dtype != compiled.dtype:
        return float("inf"), float("inf")
    if eager.numel() == 0:
        return 0.0, 0.0
    wide = torch.complex128 if eager.dtype.is_complex else torch.float64
    left, right = eager.to(wide), compiled.to(wide)
    equal = (left == right) | (left.isnan() & right.isnan())
    if bool(equal.all()):
        return 0.0, 0.0
    gap = torch.where(equal, 0.0, (left - right).abs())
    gap = gap.where(~gap.isnan(), float("inf"))
    scale = left.abs().where(left.isfinite(), 0.0).max().item()
    absolute = gap.max().item()
    return absolute, absolute / scale if scale else float("inf")
