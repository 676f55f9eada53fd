"""A fusion's numbers: pattern against replacement, both measured against the same formula in float64.

Two roundings of one formula differ from each other and neither is "right", so a replacement passes when it is no
further from the truth than the pattern is, plus one rounding step of its dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

TensorFn = Callable[..., tuple[torch.Tensor, ...]]


@dataclass(frozen=True, slots=True)
class NumericCase:
    """Three spellings of one computation and the tensors to run them on.

    Attributes:
        label: what is varied, such as ``"llama bfloat16 (3, 8)"``.
        inputs: the tensors, passed positionally.
        pattern: what the pass matches, as the model computes it.
        replacement: what the pass puts in its place.
        exact: the formula without any rounding on purpose; called with the inputs in float64.
    """

    label: str
    inputs: tuple[torch.Tensor, ...]
    pattern: TensorFn
    replacement: TensorFn
    exact: TensorFn


@dataclass(frozen=True, slots=True)
class Comparison:
    """The outcome of one case. Errors are maxima over all outputs, relative to each output's largest exact value.

    Attributes:
        label: the case's.
        pattern_error: distance of the pattern from float64.
        replacement_error: distance of the replacement from float64.
        tolerance: one rounding step (``torch.finfo(dtype).eps``) of the coarsest output dtype.
    """

    label: str
    pattern_error: float
    replacement_error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the replacement is no further from float64 than the pattern plus one rounding step."""
        return self.replacement_error <= self.pattern_error + self.tolerance


def compare(case: NumericCase) -> Comparison:
    """Run a case.

    Raises:
        ValueError: pattern and replacement differ in number, shape or dtype of their outputs.
    """
    exact = case.exact(*(tensor.double() for tensor in case.inputs))
    pattern = case.pattern(*case.inputs)
    replacement = case.replacement(*case.inputs)
    shown = [[(tuple(tensor.shape), tensor.dtype) for tensor in outputs] for outputs in (pattern, replacement)]
    if shown[0] != shown[1]:
        raise ValueError(f"{case.label}: the pattern returns {shown[0]}, the replacement {shown[1]}")
    return Comparison(
        case.label,
        pattern_error=_error(pattern, exact),
        replacement_error=_error(replacement, exact),
        tolerance=max(torch.finfo(tensor.dtype).eps for tensor in pattern),
    )


def _error(outputs: tuple[torch.Tensor, ...], exact: tuple[torch.Tensor, ...]) -> float:
    worst = 0.0
    for output, truth in zip(outputs, exact, strict=True):
        if not torch.isfinite(output).all():
            return float("inf")
        if truth.numel():
            scale = truth.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
            worst = max(worst, float((output.double() - truth).abs().max() / scale))
    return worst
