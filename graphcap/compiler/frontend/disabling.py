"""A block in which what was compiled runs eager."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

is_disabled: ContextVar[bool] = ContextVar("graphcap_disabled", default=False)


@contextlib.contextmanager
def disabled() -> Iterator[None]:
    """Within it, what :func:`graphcap.compile` and ``@support_graph_compile`` compiled runs eager.

    It holds for this thread or task, and what was compiled is kept. A ``torch.compile(..., backend="graphcap")`` is
    torch's own and not concerned: use ``torch.compiler.set_stance("force_eager")`` there.
    """
    token = is_disabled.set(True)
    try:
        yield
    finally:
        is_disabled.reset(token)
