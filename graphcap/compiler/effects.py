"""Which of its inputs a piece writes: found by running it once on fake tensors and watching every operator's schema.

Names say too little (``relu_``, ``out=``, custom ops with ``mutates_args``), schemas say nearly all: the old batch
norms write their running statistics without a word, and a custom op may be registered without saying what it writes
(``register_op(out_args=...)`` says it then).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils._python_dispatch import TorchDispatchMode

from graphcap.compiler import nodes, private
from graphcap.compiler.rules import declared

#: Higher-order ops have no schema. These write nothing; every other one counts as writing all that it is given.
_FUNCTIONAL_HIGHER_ORDER = {"flex_attention"}

#: These write arguments 3 and 4, the running mean and variance, where argument 5 says that they train.
_BATCH_NORMS = {"aten::native_batch_norm", "aten::cudnn_batch_norm", "aten::miopen_batch_norm"}


class _WriteRecorder(TorchDispatchMode):
    """Collects the storages that operators declare as written."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.written: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for leaf in nodes.leaves(list(declared_written(func, args, kwargs))):
            if isinstance(leaf, torch.Tensor):
                self.written.add(private.storage_id(leaf))
        return func(*args, **kwargs)


def declared_written(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Any]:
    """The arguments that an operator writes."""
    if isinstance(func, torch._ops.HigherOrderOperator):
        yield from () if func.name() in _FUNCTIONAL_HIGHER_ORDER else (args, dict(kwargs))
        return
    told = declared(func)
    for index, argument in enumerate(func._schema.arguments):
        marked = argument.alias_info is not None and argument.alias_info.is_write
        if marked or (told is not None and argument.name in told.out_args):
            yield args[index] if index < len(args) else kwargs.get(argument.name)
    if func._schema.name in _BATCH_NORMS and args[5]:
        yield from args[3:5]


def mutated_inputs(piece: fx.GraphModule) -> tuple[int, ...]:
    """The positions of the placeholders whose memory a piece writes, also through views and through aliasing inputs.

    A piece that cannot be run on fake tensors counts as writing every tensor that it gets: that costs copies, never
    correctness.
    """
    values = [nodes.value_of(node) for node in piece.graph.nodes if node.op == "placeholder"]
    storages = [private.storage_id(v) if isinstance(v, torch.Tensor) else None for v in values]
    fake_mode = private.fake_mode_of(values)
    recorder = _WriteRecorder()
    try:
        with torch.no_grad(), private.as_dynamo_traces(fake_mode), recorder:
            fx.Interpreter(piece, garbage_collect_values=False).run(*values, enable_io_processing=False)
    except Exception:  # whatever an operator's fake raises: assume the worst
        return tuple(i for i, storage in enumerate(storages) if storage is not None)
    return tuple(i for i, storage in enumerate(storages) if storage in recorder.written)


def written_overlap(piece: fx.GraphModule, written: Sequence[int]) -> str:
    """Why a piece must run as it is: two of its inputs share memory that it writes; ``""`` where none do.

    AOTAutograd compiles such a piece for the tensor that both are views of, and finds another one, or none, where the
    piece before it made the views. Inputs whose bytes lie apart (keys and values in one buffer) are no such case.
    """
    inputs = [node for node in piece.graph.nodes if node.op == "placeholder"]
    for index, a in enumerate(written):
        for b in written[:index]:
            first, second = nodes.value_of(inputs[a]), nodes.value_of(inputs[b])
            if private.storage_id(first) == private.storage_id(second) and not _lie_apart(first, second):
                return f"{inputs[b].name} and {inputs[a].name} share memory that it writes"
    return ""


def _lie_apart(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether the address ranges of two tensors of one storage are known, and disjoint."""
    ranges = []
    for tensor in (a, b):
        if not all(isinstance(size, int) for size in (*tensor.shape, *tensor.stride(), tensor.storage_offset())):
            return False
        start = tensor.storage_offset() * tensor.element_size()
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        ranges.append((start, start + (last + 1) * tensor.element_size()))
    (a_start, a_end), (b_start, b_end) = ranges
    return a_end <= b_start or b_end <= a_start
