"""A step says what batch it is: nested, threaded, checked."""

from __future__ import annotations

import threading

import pytest
import torch

from graphcap.config import CUDAGraphMode
from graphcap.cudagraph.metadata import Serving, dims_of_step
from graphcap.cudagraph.step import Dispatch, GraphKey, current, current_step, step
from graphcap.errors import StepError


def test_the_innermost_step_counts() -> None:
    assert current() is None
    with step(num_tokens=8) as outer:
        with step(num_tokens=2, tags={"draft": True}) as inner:
            assert current_step() is inner
        assert current_step() is outer
    assert current() is None


def test_a_step_ends_with_an_exception() -> None:
    with pytest.raises(ZeroDivisionError), step(num_tokens=1):
        raise ZeroDivisionError
    assert current() is None


def test_a_step_belongs_to_its_thread() -> None:
    seen: list[object] = []
    with step(num_tokens=8):
        thread = threading.Thread(target=lambda: seen.append(current()))
        thread.start()
        thread.join()
    assert seen == [None]


def test_no_step_is_an_error_where_one_is_needed() -> None:
    with pytest.raises(StepError, match=r"no graphcap\.step"):
        current_step()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_tokens": -1}, "num_tokens=-1: expected a number of at least 0"),
        ({"num_tokens": 2.5}, "num_tokens=2.5"),
        ({"num_tokens": 7, "uniform_query_len": 2}, "no multiple of uniform_query_len=2"),
        ({"num_tokens": 8, "num_reqs": 3, "uniform_query_len": 2}, "num_reqs=3 x uniform_query_len=2"),
        ({"num_reqs": 3}, "num_tokens is missing"),
        ({"num_tokens": 3, "key": GraphKey(3)}, "not both"),
        ({"num_tokens": 3, "tags": {"lora": [1]}}, "lora=.* is not hashable"),
        ({"num_tokens": 3, "tags": {1: 2}}, "1 is no name"),
        ({"num_tokens": 3, "max_mode": "AUTO"}, "expected NONE, PIECEWISE or FULL"),
    ],
)
def test_impossible_batches_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(StepError, match=message):
        step(**arguments)  # type: ignore[arg-type]


def test_a_step_is_used_once_at_a_time() -> None:
    said = step(num_tokens=1)
    with said, pytest.raises(StepError, match="in progress already"), said:
        pass
    with said:
        assert current() is said


def test_tags_are_compared_by_content() -> None:
    assert step(num_tokens=1, tags={"a": 1, "b": 2}).token == step(num_tokens=1, tags={"b": 2, "a": 1}).token
    assert step(num_tokens=1, tags={"a": 1}).token != step(num_tokens=1, tags={"a": 2}).token


def test_a_dispatch_brings_its_batch() -> None:
    decision = Dispatch(CUDAGraphMode.FULL, 8, 8, GraphKey(5, 5, 1))
    assert step(dispatch=decision).key == GraphKey(5, 5, 1)


def test_inputs_are_found_by_name() -> None:
    lens = torch.tensor([3, 4])
    with step(num_tokens=2, inputs={"seq_lens": lens}):
        assert current_step().inputs["seq_lens"] is lens
        with pytest.raises(StepError, match="no input 'seq_len'; did you mean 'seq_lens'"):
            current_step().inputs["seq_len"]
        assert "seq_lens" in current_step().inputs
        assert "seq_len" not in current_step().inputs
        assert current_step().inputs.get("seq_lens") is lens
        assert current_step().inputs.get("seq_len", 7) == 7


DIMS = dims_of_step({"step.seq_lens": {0: "num_reqs"}, "input_ids": {0: "num_tokens"}})


def serving(**named: int) -> Serving:
    return Serving(named, DIMS, {"step.seq_lens": -1})


def test_served_inputs_are_padded_and_stay_where_they_are() -> None:
    held = serving(num_reqs=4)
    with step(num_tokens=2, inputs={"seq_lens": torch.tensor([3, 4])}), held:
        first = current_step().inputs["seq_lens"]
        assert first.tolist() == [3, 4, -1, -1]
    later = step(num_tokens=3, inputs={"seq_lens": torch.tensor([7, 8, 9])})
    held.refresh(later.inputs)
    with later, held:
        assert current_step().inputs["seq_lens"] is first
        assert first.tolist() == [7, 8, 9, -1]
    held.refresh(step(num_tokens=1, inputs={"seq_lens": torch.tensor([5])}).inputs)
    assert first.tolist() == [5, -1, -1, -1], "what an earlier batch left behind is filled again"


def test_an_input_with_a_dim_that_the_plan_does_not_fix_is_the_engines_own() -> None:
    lens = torch.tensor([3, 4])
    with step(num_tokens=2, inputs={"seq_lens": lens}), serving(num_tokens=8):
        assert current_step().inputs["seq_lens"] is lens


def test_what_does_not_fit_the_buffers_is_refused() -> None:
    held = serving(num_reqs=2)
    with step(num_tokens=2, inputs={"seq_lens": torch.tensor([3, 4])}), held:
        current_step().inputs["seq_lens"]
    for bad, message in [
        ({"seq_lens": torch.tensor([1, 2, 3])}, r"has size \(3,\), the graph \(2,\)"),
        ({"seq_lens": torch.tensor([1.0])}, "torch.float32"),
        ({}, "which this step does not bring"),
    ]:
        with pytest.raises(StepError, match=message):
            held.refresh(step(num_tokens=1, inputs=bad).inputs)


def test_a_first_read_while_recording_is_refused() -> None:
    held = serving(num_reqs=2)
    held.is_recording = True
    given = step(num_tokens=1, inputs={"seq_lens": torch.tensor([1])})
    with given, held, pytest.raises(StepError, match="was not read in the warm-up"):
        current_step().inputs["seq_lens"]
