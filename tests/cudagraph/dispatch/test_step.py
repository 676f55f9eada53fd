"""A step says what batch it is: nested, threaded, checked."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from graphcap.config import CUDAGraphMode
from graphcap.cudagraph.dispatch.key import Dispatch, GraphKey
from graphcap.cudagraph.dispatch.metadata import Serving, dims_of_step
from graphcap.cudagraph.dispatch.step import current, current_step, step
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
        ({"sizes": {"batch": -1}}, "batch=-1"),
        ({"sizes": [8]}, r"sizes=\[8\]: expected a dict"),
        ({"num_tokens": 3, "tags": [("lora", 1)]}, r"tags=\[\('lora', 1\)\]: expected a dict"),
        ({"num_tokens": 3, "inputs": [1]}, r"inputs=\[1\]: expected a dict"),
        ({"num_tokens": 3, "inputs": torch.ones(2)}, r"inputs=tensor.*: expected a dict"),
        ({"num_tokens": 3, "dispatch": "x"}, r"dispatch='x': expected what graphcap\.dispatch\(\.\.\.\) returned"),
        ({"key": 3}, "key=3: expected a GraphKey"),
        ({"sizes": {"num_tokens": 2}}, "'num_tokens' is not the name of a further dim"),
        ({"sizes": {"batch": 2}, "key": GraphKey(3)}, "not both"),
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


def test_named_dims_make_a_batch_without_a_number_of_tokens() -> None:
    key = step(sizes={"seq": 16, "batch": 3}).key
    assert key == GraphKey(48, sizes=(("batch", 3), ("seq", 16)))
    assert (key.size("seq"), key.size("num_tokens"), str(key)) == (16, 48, "batch=3, seq=16")
    assert step(num_tokens=8, sizes={"blocks": 4}).key == GraphKey(8, sizes=(("blocks", 4),))
    with pytest.raises(StepError, match="no 'sequence'"):
        key.size("sequence")


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
        ({"seq_lens": [1]}, "is a list; the graph was captured with a tensor"),
        ({}, "which this step does not bring"),
    ]:
        with pytest.raises(StepError, match=message):
            held.refresh(step(num_tokens=1, inputs=bad).inputs)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3), st.integers(0, 2)), min_size=1, max_size=6))
def test_buffers_hold_what_the_latest_step_brings_and_the_fill_around_it(sizes: list[tuple[int, int, int]]) -> None:
    dims = dims_of_step({"step.lens": {0: "r"}, "step.table": {0: "r", 1: "b"}, "step.half": {0: "n"}})
    fills = {"step.lens": -1, "step.table": lambda tensor, size: tensor[size[0] :].fill_(7)}
    held = Serving({"r": 4, "b": 3, "n": 2}, dims, fills)
    first = {"lens": torch.ones(4).long(), "table": torch.ones(4, 3).long(), "half": torch.ones(2)}
    with step(num_tokens=4, inputs=first) as said, held:
        buffers = dict(said.inputs)
    for number, (r, b, n) in enumerate(sizes):
        brought = {
            "lens": torch.full((r,), number),
            "table": torch.full((r, b), number),
            "half": torch.full((n,), float(number)),
        }
        held.refresh(step(num_tokens=4, inputs=brought).inputs)
        assert buffers["lens"].tolist() == [number] * r + [-1] * (4 - r)
        assert buffers["half"].tolist() == [number] * n + [0] * (2 - n)
        assert (buffers["table"][:r, :b] == number).all()
        assert (buffers["table"][r:] == 7).all()


class Operators(TorchDispatchMode):
    """Their names, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_a_step_of_known_sizes_costs_one_copy_for_each_dtype() -> None:
    held = Serving({"r": 4}, dims_of_step({f"step.{name}": {0: "r"} for name in ("a", "b", "c")}), {})

    def inputs(size: int) -> dict[str, torch.Tensor]:
        return {"a": torch.ones(size).long(), "b": torch.ones(size).long(), "c": torch.ones(size)}

    with step(num_tokens=4, inputs=inputs(3)) as said, held:
        dict(said.inputs)
    later = [step(num_tokens=4, inputs=inputs(size)).inputs for size in (3, 2, 2, 3, 4)]
    copies = ["_foreach_copy_", "_foreach_copy_"]
    held.refresh(later[0])
    held.refresh(later[1])
    for number, expected in [(2, []), (3, ["fill_"] * 3), (4, [])]:
        with Operators() as operators:
            held.refresh(later[number])
        called = [name for name in operators.names if name not in ("slice", "narrow")]
        assert called == [*copies, *expected]


def test_a_fill_that_raises_leaves_no_rows_of_an_earlier_step_behind() -> None:
    raising = False

    def fill(tensor: torch.Tensor, size: torch.Size) -> None:
        if raising:
            raise ZeroDivisionError

    held = Serving({"r": 4}, dims_of_step({"step.a": {0: "r"}, "step.b": {0: "r"}}), {"step.a": fill})

    def inputs(size: int) -> dict[str, torch.Tensor]:
        return {"a": torch.ones(size), "b": torch.ones(size)}

    with step(num_tokens=4, inputs=inputs(1)) as said, held:
        b = said.inputs["a"], said.inputs["b"]
    held.refresh(step(num_tokens=4, inputs=inputs(1)).inputs)
    raising = True
    with pytest.raises(ZeroDivisionError):
        held.refresh(step(num_tokens=4, inputs=inputs(3)).inputs)
    raising = False
    held.refresh(step(num_tokens=4, inputs=inputs(1)).inputs)
    assert b[1].tolist() == [1, 0, 0, 0]


def test_a_first_read_while_recording_is_refused() -> None:
    held = serving(num_reqs=2)
    held.is_recording = True
    given = step(num_tokens=1, inputs={"seq_lens": torch.tensor([1])})
    with given, held, pytest.raises(StepError, match="was not read in the warm-up"):
        current_step().inputs["seq_lens"]


def test_threads_may_be_in_the_same_buffers_at_once() -> None:
    """Each leaves them for what was in force before in that thread, whoever came first."""
    held, meet, seen = serving(num_reqs=4), threading.Barrier(2), list[bool]()

    def run(leaves_first: bool) -> None:
        with step(num_tokens=2, inputs={"seq_lens": torch.tensor([3, 4])}):
            with held:
                meet.wait()
                seen.append(len(current_step().inputs["seq_lens"]) == 4)
                meet.wait()
                if not leaves_first:
                    meet.wait()
            if leaves_first:
                meet.wait()
            seen.append(len(current_step().inputs["seq_lens"]) == 2)

    with held, step(num_tokens=2, inputs={"seq_lens": torch.tensor([3, 4])}):
        current_step().inputs["seq_lens"]  # made before, so that only one thread fills it
    threads = [threading.Thread(target=run, args=(first,)) for first in (True, False)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert seen == [True] * 4
