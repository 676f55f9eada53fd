"""A vision transformer: image batches in, the same class scores out."""

from __future__ import annotations

from typing import Any

import torch
from transformers import ViTConfig, ViTForImageClassification

import graphcap
from tests.models.decoders import backend, distinct_pieces, plans, regions_of, served

TINY = ViTConfig(
    image_size=32,
    patch_size=8,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_labels=10,
    initializer_range=0.3,
)
BATCHES = (1, 4, 4, 4, 4, 2)


def compare_with_eager(compile_in_place: Any, replayed: int = 1) -> Any:
    torch.manual_seed(0)
    model = ViTForImageClassification(TINY).eval()
    images = [torch.randn(batch, 3, 32, 32) for batch in BATCHES]
    with torch.no_grad():
        eager = [model(pixel_values=batch).logits for batch in images]
        compile_in_place(model)
        for batch, expected in zip(images, eager, strict=True):
            torch.testing.assert_close(model(pixel_values=batch).logits, expected, rtol=1e-4, atol=1e-4)

    assert served(model).total == len(images)
    assert served(model).replayed == replayed
    assert [(plan.mode, plan.key, plan.num_segments) for plan in plans(model)] == [("FULL", (4,), 1)]
    # Three layers: before the first attention, between two (twice the same), after the last; attention three times.
    assert {(len(region.pieces), distinct_pieces(region)) for region in regions_of(model)} == {(7, 4)}
    return model


def test_class_scores_are_eagers() -> None:
    model = compare_with_eager(lambda model: model.compile(backend=backend(), options={"simulate": True}))

    assert len(regions_of(model)) == 2, "one image, and any number of them"
    assert {piece.origin for region in regions_of(model) for piece in region.pieces} <= {"compiled", "cache", "eager"}


def test_convolution_of_a_batch_of_any_size_is_not_left_to_inductor() -> None:
    model = compare_with_eager(
        lambda model: graphcap.compile(model, dynamic_arg_dims={"pixel_values": 0}, simulate=True),
        replayed=2,  # a declared size is captured at its second sight
    )

    if any("dims are marked dynamic" in note for note in graphcap.explain(model).notes):
        # torch before 2.13 cannot trace the convolution for any size: one image, and any other number of them.
        assert len(regions_of(model)) == 2
        return
    (region,) = regions_of(model)
    (patches,) = (piece for piece in region.pieces if piece.origin == "failed")
    assert "convolution of unknown batch size" in patches.note
