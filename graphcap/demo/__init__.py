"""``graphcap demo``: a Hugging Face decoder generates tokens eager and through graphcap. Are they the same, how fast?

:func:`run` reads as a script. ``settings.py`` holds the options, ``decoder.py`` builds the model, ``decode.py`` is the
decode loop, ``compare.py`` decides whether the results agree, ``show.py`` prints.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import torch

import graphcap
from graphcap.compiler.backend import graphcap as backend
from graphcap.demo.compare import Verdict, logits_are_as_good, tokens_agree
from graphcap.demo.decode import Run, forced, greedy
from graphcap.demo.decoder import Decoder, build_decoder
from graphcap.demo.settings import Settings, parse
from graphcap.demo.show import Outcome, text_of


def main(argv: Sequence[str]) -> int:
    """Run the demo; returns 0 when graphcap's results agree with eager's, 1 when they do not.

    Raises:
        MissingExtraError: transformers is not installed.
    """
    return run(parse(argv))


def run(settings: Settings) -> int:
    """Build, decode eager, decode with graphcap, compare, report."""
    with torch.no_grad():
        decoder = build_decoder(settings)
        eager = [greedy(decoder, prompt) for prompt in decoder.prompts]
        reference = fp32_reference(decoder, eager[-1]) if settings.dtype is torch.bfloat16 else None

        decoder.model.compile(
            backend=backend,
            options={"progress": not settings.json, "simulate": settings.device.type == "cpu"},
        )
        ours = [greedy(decoder, prompt) for prompt in decoder.prompts]
        report = graphcap.explain(decoder.model)
        verdict = judge(decoder, eager, ours, reference)

    outcome = Outcome(settings, decoder.describe(), eager, ours, verdict, report)
    print(json.dumps(outcome.to_dict(), indent=2) if settings.json else text_of(outcome))
    return 0 if verdict.agrees else 1


def fp32_reference(decoder: Decoder, eager: Run) -> Run:
    """The same weights in fp32, made to say what eager said for the last prompt."""
    return forced(decoder.in_fp32(), decoder.prompts[-1], eager.tokens)


def judge(decoder: Decoder, eager: list[Run], ours: list[Run], reference: Run | None) -> Verdict:
    """fp32 is judged by its tokens, bf16 by its distance from fp32."""
    if reference is None:
        return tokens_agree(eager, ours)
    as_eager = forced(decoder, decoder.prompts[-1], eager[-1].tokens)
    return logits_are_as_good(reference, eager[-1], as_eager, tokens_agree(eager, ours))


__all__ = ["main", "run"]
