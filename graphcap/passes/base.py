"""What a pass is, and what it leaves behind.

A pass rewrites a post-grad ATen graph in place: functional, after AOTAutograd and its decompositions, before Inductor's
own passes. It knows nothing about where the graph came from; the runner in :mod:`graphcap.passes.pipeline` times it,
lints the graph, and undoes it when it fails.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from graphcap.passes.fingerprint import pass_fingerprint


@dataclass(frozen=True, slots=True)
class PassResult:
    """What one pass did to one graph. Plain values only, so that it is stored as JSON beside the artifact.

    Attributes:
        name: the pass.
        matches: places where the pattern was found, whether or not they were rewritten.
        replaced: places that were rewritten.
        sites: one line per match: what happened there, with the user's ``file:line`` and module path where known.
        nodes_before: nodes in the graph before the pass; like all fields below filled by the runner.
        nodes_after: nodes in the graph after it.
        seconds: wall-clock time of the pass.
        before: the graph as Python code, only when the pass changed it.
        after: the same afterwards.
        error: why the pass failed; the graph is then what it was before.
    """

    name: str
    matches: int = 0
    replaced: int = 0
    sites: tuple[str, ...] = ()
    nodes_before: int = 0
    nodes_after: int = 0
    seconds: float = 0.0
    before: str | None = None
    after: str | None = None
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; :meth:`from_dict` gives back an equal result."""
        return {**dataclasses.asdict(self), "sites": list(self.sites)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PassResult:
        """The result that :meth:`to_dict` was called on.

        Raises:
            TypeError: ``data`` lacks ``name`` or holds a field that this version does not know.
        """
        return cls(**{**data, "sites": tuple(data.get("sites", ()))})


class GraphPass(ABC):
    """One rewrite of a post-grad graph.

    Options are bound when the pass is built and become part of :meth:`fingerprint`; a call must not change the
    instance, because one instance serves every graph of a process, from several threads.
    """

    #: The name in logs, dumps, reports and ``disable_passes=[...]``.
    name: ClassVar[str]

    #: Modules besides the ones that define the class whose code decides what the pass generates, as dotted names.
    depends_on: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def __call__(self, graph: fx.Graph) -> PassResult:
        """Rewrite ``graph`` in place; say what was found and done. The runner fills in nodes, time and text.

        Raises:
            Exception: anything; the runner restores the graph, logs, and compiles on without this pass.
        """

    def applies_to(self, device: torch.device) -> bool:
        """Whether the pass rewrites graphs on ``device``. Elsewhere it only reports its matches."""
        return True

    def fingerprint(self) -> str:
        """Hex digest of everything that decides what this pass generates: its code and its options.

        Raises:
            TypeError: an option has no canonical text, or the source cannot be found; override this method then.
        """
        return pass_fingerprint(type(self), self.depends_on, vars(self))
