"""The hand-made floor must compute the lab decoder, or its time says nothing."""

from __future__ import annotations

import pytest
import torch

from bench import handmade, models


@pytest.fixture
def decoder() -> models.Decoder:
    return models.build_decoder(models.CONFIGS["tiny"], torch.device("cpu"), torch.float32, max_sequences=4)


def test_pieces_of_the_loop_compute_the_model(decoder: models.Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda fn, **_: fn)
    inputs = models.decode_inputs(decoder.config, torch.device("cpu"), num_tokens=3, seed=5)
    expected = decoder(*inputs)
    models.poison_slots(decoder, inputs[2])
    loop = handmade.PiecewiseLoop(decoder, inputs)
    assert torch.equal(loop.run_compiled(models.attend), expected)


def test_decoder_reads_every_input(decoder: models.Decoder) -> None:
    first, second = (models.decode_inputs(decoder.config, torch.device("cpu"), 3, seed) for seed in (1, 2))
    expected = decoder(*first)
    for index in range(3):
        models.fill_caches(decoder)
        mixed = (*first[:index], second[index], *first[index + 1 :])
        assert not torch.allclose(decoder(*mixed), expected)


def test_a_missing_cache_write_is_a_nan(decoder: models.Decoder) -> None:
    inputs = models.decode_inputs(decoder.config, torch.device("cpu"), num_tokens=2, seed=5)
    models.poison_slots(decoder, inputs[2])
    elsewhere = (inputs[2] + 1) % decoder.config.context
    assert decoder(*inputs[:2], elsewhere).isnan().any()


def test_variants_share_weights_and_caches(decoder: models.Decoder) -> None:
    twin = models.share_tensors(decoder)
    assert twin is not decoder
    assert twin.layers[0] is not decoder.layers[0]
    tensors = [*decoder.parameters(), *decoder.buffers()]
    assert all(a is b for a, b in zip(tensors, [*twin.parameters(), *twin.buffers()], strict=True))
