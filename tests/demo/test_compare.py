"""What counts as agreement."""

from __future__ import annotations

import torch

from graphcap.demo.compare import logits_are_as_good, tokens_agree
from graphcap.demo.decode import Run


def run_of(logits: torch.Tensor) -> Run:
    """What greedy decoding makes of logits [new_tokens, batch, vocab]."""
    return Run(logits.argmax(-1).T.contiguous(), logits, ())


def logits_of(*, seed: int = 0) -> torch.Tensor:
    return torch.randn(6, 2, 10, generator=torch.Generator().manual_seed(seed))


def test_equal_tokens_agree() -> None:
    eager = logits_of()
    verdict = tokens_agree([run_of(eager)], [run_of(eager + 1e-6)])
    assert verdict.agrees
    assert 5e-7 < verdict.max_difference < 2e-6


def test_first_other_token_is_named() -> None:
    eager, ours = logits_of(), logits_of()
    ours[3, 1] = -ours[3, 1]
    ours[4, 0] = -ours[4, 0]
    verdict = tokens_agree([run_of(eager), run_of(eager)], [run_of(eager), run_of(ours)])
    assert not verdict.agrees
    assert verdict.first_difference == (1, 1, 3)
    assert "prompt 2, sequence 2: token 4 is not eager's" in verdict.text


def test_differences_after_the_first_other_token_do_not_count() -> None:
    eager, ours = logits_of(), logits_of()
    ours[2, 0] = -ours[2, 0]
    ours[3:] += 100
    assert tokens_agree([run_of(eager)], [run_of(ours)]).max_difference < 10


def test_bf16_may_be_as_far_from_fp32_as_eager() -> None:
    reference, eager = logits_of(), logits_of() + 0.01 * logits_of(seed=1)
    ours = logits_of() + 0.01 * logits_of(seed=2)
    other_tokens = tokens_agree([run_of(eager)], [run_of(-eager)])
    verdict = logits_are_as_good(run_of(reference), run_of(eager), run_of(ours), other_tokens)
    assert verdict.agrees
    assert verdict.first_difference == (0, 0, 0), "reported, not failed"


def test_bf16_may_not_be_further_from_fp32_than_eager() -> None:
    reference, eager = logits_of(), logits_of() + 0.01 * logits_of(seed=1)
    ours = logits_of() + 0.02 * logits_of(seed=2)
    same_tokens = tokens_agree([run_of(eager)], [run_of(eager)])
    verdict = logits_are_as_good(run_of(reference), run_of(eager), run_of(ours), same_tokens)
    assert not verdict.agrees
    assert "MORE than" in verdict.text
