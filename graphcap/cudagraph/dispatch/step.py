"""What kind of batch the current forward is: said by an engine around the call, read by the graph runtime and by ops.

A model's arguments show its sizes. They do not show that every request of a batch brings one token, that an adapter is
active, or the attention metadata that an op fetches from the side. :class:`step` says it::

    with graphcap.step(num_tokens=37, num_reqs=37, uniform_query_len=1, tags={"lora": 2}, inputs={"seq_lens": lens}):
        model(input_ids, positions)

A step holds for its thread or task; steps nest, the innermost counts.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from contextvars import Token
from typing import Any

from graphcap.config import CUDAGraphMode
from graphcap.cudagraph.dispatch.current_step import current_step as current_step
from graphcap.cudagraph.dispatch.in_force import step_now
from graphcap.cudagraph.dispatch.key import Dispatch, GraphKey, as_runtime_mode, check_type, key_of
from graphcap.cudagraph.dispatch.step_inputs import StepInputs
from graphcap.errors import StepError


class step:
    """Say what batch the calls inside of the ``with`` block have.

    Args:
        num_tokens: rows of the batch.
        num_reqs: requests in it.
        uniform_query_len: the tokens of each request where all have the same number. It is a promise: ops declared with
            ``register_op(capture="uniform_batch")`` are captured on the strength of it.
        tags: what else distinguishes the batch. Tags named in ``specialize_tags`` have plans of their own.
        sizes: of the dims with other names; with them ``num_tokens`` may be left out, and is their product.
        key: all of these at once, instead.
        dispatch: a decision of :func:`graphcap.dispatch` that the calls follow.
        max_mode: NONE, PIECEWISE or FULL (or their names): the most that these calls may use.
        inputs: tensors that the model and its ops read, and never write, as
            ``graphcap.current_step().inputs[name]``. Their dynamic dims are declared on the model, as
            ``dynamic_arg_dims={"step.seq_lens": {0: "num_reqs"}}``.

    Raises:
        StepError: sizes that no batch has, or arguments that contradict each other.
    """

    __slots__ = ("_token", "dispatch", "inputs", "key", "max_mode", "token")

    def __init__(
        self,
        num_tokens: int | None = None,
        num_reqs: int | None = None,
        uniform_query_len: int | None = None,
        tags: Mapping[str, Hashable] | None = None,
        *,
        sizes: Mapping[str, int] | None = None,
        key: GraphKey | None = None,
        dispatch: Dispatch | None = None,
        max_mode: CUDAGraphMode | str | None = None,
        inputs: Mapping[str, Any] | None = None,
    ) -> None:
        if key is not None:
            check_type("key", key, GraphKey, "a GraphKey, as graphcap.GraphKey(num_tokens)")
        if dispatch is not None:
            check_type("dispatch", dispatch, Dispatch, "what graphcap.dispatch(...) returned")
        sized = num_tokens is not None or num_reqs is not None or uniform_query_len is not None
        given = sized or tags is not None or sizes is not None
        if key is not None and given:
            raise StepError("give key= or the sizes one by one, not both")
        if key is None and (num_tokens is not None or sizes is not None):
            key = key_of(num_tokens, num_reqs, uniform_query_len, tags, sizes)
        elif key is None and given:
            raise StepError("num_tokens is missing: a batch is known by its number of tokens first")
        if key is None and dispatch is not None:
            key = dispatch.key
        self.key = key
        self.dispatch = dispatch
        self.max_mode = as_runtime_mode(max_mode)
        self.inputs = StepInputs({} if inputs is None else inputs)
        decided = dispatch and (dispatch.mode, dispatch.num_tokens, dispatch.num_reqs, dispatch.sizes)
        #: What a table of plans must tell apart besides the sizes of the arguments.
        self.token: Hashable = (
            key and (key.num_reqs, key.uniform_query_len, key.tags), decided, self.max_mode, self.inputs.names
        )  # fmt: skip
        self._token: Token[step | None] | None = None

    def __enter__(self) -> step:
        if self._token is not None:
            raise StepError("this step is in progress already; make a new one for a nested call")
        self._token = step_now.set(self)
        return self

    def __exit__(self, *_: object) -> None:
        token, self._token = self._token, None
        if token is not None:
            step_now.reset(token)
            self.inputs.end()


#: The step in force, or ``None``. Bound once: it is called for every replay.
current = step_now.get
