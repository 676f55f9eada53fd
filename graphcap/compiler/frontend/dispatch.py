"""``graphcap.dispatch``: how a batch is going to run, before it runs.

Engines ask on every step, so an answer is remembered for as long as nothing changes that it depends on: on one CPU core
an answer costs 17 us the first time and 0.4 us from then on (one graph, torch 2.13).
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Mapping
from typing import Any

from graphcap.compiler.frontend.subject import runners_of
from graphcap.config import CUDAGraphMode
from graphcap.cudagraph import Dispatch, GraphKey, GraphRunner
from graphcap.cudagraph.dispatch.key import RUNTIME_MODES, as_runtime_mode, key_of
from graphcap.cudagraph.dispatch.revision import revision

_MAX_ANSWERS = 65536  #: kinds of batches remembered for one model


def dispatch(
    model: Any,
    *,
    num_tokens: int | None = None,
    num_reqs: int | None = None,
    uniform_query_len: int | None = None,
    tags: Mapping[str, Hashable] | None = None,
    sizes: Mapping[str, int] | None = None,
    max_mode: CUDAGraphMode | str | None = None,
) -> Dispatch:
    """How a batch is going to run, before it runs: an engine builds its metadata at the padded sizes, and data-parallel
    ranks can agree on one decision and hand it to :class:`graphcap.step`.

    Args:
        model: what was compiled.
        num_tokens: rows of the batch; may be left out where ``sizes`` has them all.
        num_reqs: requests in it.
        uniform_query_len: the tokens of each request where all have the same number.
        tags: as for :class:`graphcap.step`.
        sizes: of the dims with other names.
        max_mode: the most that this batch may use.

    Returns:
        The mode and the padded sizes. A model with several graphs runs by the best of their modes.

    Raises:
        StepError: sizes that no batch has.
        TypeError: ``model`` is nothing that could have been compiled.
    """
    known, asked = _known_of(model), None
    try:
        tagged, named = tuple(tags.items()) if tags else None, tuple(sizes.items()) if sizes else None
        asked = num_tokens, num_reqs, uniform_query_len, tagged, named, max_mode
        answer = known.answers.get(asked)
    except (AttributeError, TypeError):  # what is no dict or not hashable is refused below
        answer = None
    if answer is None:
        key = key_of(num_tokens, num_reqs, uniform_query_len, tags, sizes)
        answer, lasts = known.decide(key, as_runtime_mode(max_mode))
        if lasts and len(known.answers) < _MAX_ANSWERS:
            known.answers[asked] = answer
    return answer


class _Known:
    """What is known about one model until the next revision."""

    __slots__ = ("_runners", "answers", "revision")

    def __init__(self, model: Any) -> None:
        self.revision = revision()  # before the look at the runners: what comes up meanwhile is noticed the next time
        self.answers: dict[Hashable, Dispatch] = {}
        self._runners = [weakref.ref(runner) for runner in runners_of(model)]

    def decide(self, key: GraphKey, limit: CUDAGraphMode | None) -> tuple[Dispatch, bool]:
        """How a batch is going to run, and whether that holds until the next revision."""
        runners: list[GraphRunner] = [runner for ref in self._runners if (runner := ref()) is not None]
        if not runners:
            reason = "nothing is compiled yet: call or capture it"
            return Dispatch(CUDAGraphMode.NONE, key.num_tokens, key.num_reqs, key, reason, key.sizes), True
        decided = [runner.outlook.decide(key, limit) for runner in runners]
        best = max(decided, key=lambda each: RUNTIME_MODES.index(each[0].mode))
        return best[0], all(lasts for _, lasts in decided)


_known: weakref.WeakKeyDictionary[Any, _Known] = weakref.WeakKeyDictionary()


def _known_of(model: Any) -> _Known:
    """What is known about a model. To find its runners all of its modules are looked at."""
    try:
        known = _known.get(model)
        if known is None or known.revision is not revision():
            known = _known[model] = _Known(model)
    except TypeError:
        return _Known(model)  # no weak reference to it is possible, or it is nothing that could have been compiled
    return known
