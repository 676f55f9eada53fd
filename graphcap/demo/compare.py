"""Do two ways of running one model agree? fp32 and bf16 need different answers.

In fp32 a compiled piece differs from eager by rounding far below the gap between the two likeliest tokens, so greedy
decoding must give the same tokens. In bf16 that gap is often smaller than one rounding, and a compiled piece rounds
*less* often than eager, as it keeps fp32 inside a fused kernel: tokens may differ although nothing is wrong. There
both are compared with the same weights in fp32, on the same tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from graphcap.demo.decode import Run

#: How much further from fp32 than eager the logits may be. Two equally good roundings of a model differ in their error
#: by a few per cent; a wrong piece is off by a factor.
SLACK = 1.1


@dataclass(frozen=True)
class Verdict:
    """What came out.

    Attributes:
        agrees: whether the demo passes.
        text: one line that says what was compared and what was found.
        first_difference: ``(prompt, sequence, step)`` of the first token that is not eager's, ``None`` when all are.
        max_difference: the largest difference of two logits in steps whose tokens so far agree.
        error: for bf16 the root mean square distance of graphcap's logits from fp32, ``None`` in fp32.
        eager_error: the same for eager's logits.
    """

    agrees: bool
    text: str
    first_difference: tuple[int, int, int] | None
    max_difference: float
    error: float | None = None
    eager_error: float | None = None


def tokens_agree(eager: Sequence[Run], ours: Sequence[Run]) -> Verdict:
    """The fp32 rule: every token of every prompt."""
    count = sum(run.tokens.numel() for run in eager)
    first = next((where for n, pair in enumerate(zip(eager, ours, strict=True)) if (where := _first(n, *pair))), None)
    furthest = max(_max_difference(*pair) for pair in zip(eager, ours, strict=True))
    if first is None:
        text = f"all {count} tokens of {len(eager)} prompts are eager's; logits differ by at most {furthest:.1e}"
    else:
        text = "prompt {}, sequence {}: token {} is not eager's".format(*(each + 1 for each in first))
    return Verdict(first is None, text, first, furthest)


def logits_are_as_good(reference: Run, eager: Run, ours: Run, tokens: Verdict) -> Verdict:
    """The bf16 rule: on the same tokens, no further from fp32 than eager, up to :data:`SLACK`."""
    error, eager_error = _distance(ours, reference), _distance(eager, reference)
    agrees = error <= SLACK * eager_error
    text = (
        f"distance of the logits from fp32 on the same tokens: eager {eager_error:.2e}, graphcap {error:.2e} "
        f"({'at most' if agrees else 'MORE than'} {SLACK:g} x eager); {_tokens_in_passing(tokens)}"
    )
    return Verdict(agrees, text, tokens.first_difference, tokens.max_difference, error, eager_error)


def _tokens_in_passing(tokens: Verdict) -> str:
    return tokens.text if tokens.first_difference is None else f"{tokens.text} (in bf16 that is rounding, not a fault)"


def _first(number: int, eager: Run, ours: Run) -> tuple[int, int, int] | None:
    differs = (eager.tokens != ours.tokens).nonzero()
    if not len(differs):
        return None
    sequence, step = min(differs.tolist(), key=lambda where: where[1])
    return number, sequence, step


def _max_difference(eager: Run, ours: Run) -> float:
    """Over the steps that both reached with the same tokens."""
    same = (eager.tokens == ours.tokens).all(dim=0).int().cumprod(dim=0)
    steps = min(int(same.sum()) + 1, len(eager.logits))
    return float((eager.logits[:steps] - ours.logits[:steps]).abs().max())


def _distance(run: Run, reference: Run) -> float:
    return float((run.logits - reference.logits).double().pow(2).mean().sqrt())
