"""The passes in their order, and the runner that Inductor calls with every post-grad graph.

==========================================  ==========================================================================
:mod:`~graphcap.passes.base`                the contract: ``GraphPass`` and ``PassResult``
:mod:`~graphcap.passes.fingerprint`         what makes two passes different
:mod:`~graphcap.passes.snapshot`            how a failed pass is undone
:mod:`~graphcap.passes.sites`               where a match came from in the user's program
:mod:`~graphcap.passes.nodes`               how passes read nodes
:mod:`~graphcap.passes.selftest`            pattern against replacement, in numbers
:mod:`~graphcap.passes.kernels`             the ops that passes put into a graph
==========================================  ==========================================================================
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import time
from collections.abc import Iterable, Sequence

from torch import fx

from graphcap.errors import ConfigError, PassRequiredError, did_you_mean
from graphcap.passes.add_rms_norm import AddRmsNorm
from graphcap.passes.base import GraphPass, PassResult
from graphcap.passes.private import CustomGraphPass
from graphcap.passes.snapshot import Snapshot, graph_text

logger = logging.getLogger(__name__)


def stages() -> tuple[GraphPass, ...]:
    """The built-in passes, in the order in which they run."""
    return (AddRmsNorm(),)


class PassPipeline(CustomGraphPass):
    """Runs the enabled passes over each graph that Inductor compiles, one instance per compiled piece.

    Goes into Inductor's ``post_grad_custom_pre_pass``: when the post pass runs, Inductor has already turned
    ``residual + x @ w`` into ``addmm``. One object for all passes, since 2.11 takes only one.

    Attributes:
        passes: the enabled passes, in order.
        results: one per pass and graph seen so far; Inductor hands over a piece's graph and also its subgraphs.
        salt: joins :meth:`uuid`. A compile that must really happen sets a fresh one, so that none of Inductor's own
            caches answers in its place and the passes run.
    """

    def __init__(
        self, disable: Sequence[str] = (), require: Sequence[str] = (), extra: Sequence[GraphPass] = ()
    ) -> None:
        """Choose the passes by name.

        Args:
            disable: passes that do not run. A pass that is also required is disabled, which is logged.
            require: passes that must match somewhere; see :meth:`check_required`.
            extra: the caller's passes, run after the built-in ones.

        Raises:
            ConfigError: an unknown name, or two passes of one name.
            TypeError: a pass cannot be fingerprinted.
        """
        available = (*stages(), *extra)
        names = [stage.name for stage in available]
        _check_names(names, disable=disable, require=require)
        both = sorted(set(disable) & set(require))
        if both:
            logger.warning("passes both required and disabled do not run: %s", ", ".join(both))
        self.passes = tuple(stage for stage in available if stage.name not in disable)
        self.results: list[PassResult] = []
        self.salt = ""
        self._require = tuple(name for name in require if name not in disable)
        identities = "\n".join(f"{stage.name} {stage.fingerprint()}" for stage in self.passes)
        self._fingerprint = hashlib.sha256(identities.encode()).hexdigest()

    def __call__(self, graph: fx.Graph) -> None:
        """Run every pass over ``graph`` in place; a failing one is undone and logged. Called by Inductor."""
        self.results.extend([_run(stage, graph) for stage in self.passes])

    def fingerprint(self) -> str:
        """Hex digest of the enabled passes, their order, code and options: the part of a piece's key."""
        return self._fingerprint

    def uuid(self) -> str:
        """What Inductor's own cache keys see: the fingerprint and the salt."""
        return f"graphcap-{self.fingerprint()}-{self.salt}"

    def check_required(self, results: Iterable[PassResult]) -> None:
        """Check over all graphs of a region that every required pass matched.

        Args:
            results: of this process or as stored beside artifacts.

        Raises:
            PassRequiredError: a required pass has no match in ``results``.
        """
        results = tuple(results)
        for name in self._require:
            own = [result for result in results if result.name == name]
            if any(result.matches for result in own):
                continue
            if not own:
                raise PassRequiredError(
                    f"the required pass {name!r} saw no graph: no piece of this region went through Inductor, where "
                    f"passes run. graphcap.explain() says why for each piece; drop {name!r} from require_passes if "
                    "that is as it should be"
                )
            failed = next((f"; it failed: {result.error}" for result in own if result.error), "")
            raise PassRequiredError(
                f"the required pass {name!r} matched nothing in {len(own)} graphs{failed}. Either the model does not "
                f"contain the pattern or it is written in a way the pass does not know: look at the graphs with "
                f"debug_dir=..., or drop {name!r} from require_passes"
            )


def _check_names(names: Sequence[str], **chosen: Sequence[str]) -> None:
    """Refuse doubled names, and chosen names that no pass has."""
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise ConfigError(f"two passes have the same name: {', '.join(doubled)}; give each pass a name of its own")
    for setting, wanted in chosen.items():
        for name in wanted:
            if name not in names:
                raise ConfigError(f"{setting}_passes: there is no pass {name!r}; {did_you_mean(name, names)}")


def _run(stage: GraphPass, graph: fx.Graph) -> PassResult:
    """One pass over one graph: timed, linted, compared, and undone when anything of that fails."""
    nodes_before = len(graph.nodes)
    before = after = ""
    snapshot: Snapshot | None = None
    start = time.perf_counter()
    try:
        before = graph_text(graph)
        snapshot = Snapshot(graph)
        start = time.perf_counter()
        result = stage(graph)
        graph.lint()
        if not isinstance(result, PassResult):
            raise TypeError(f"a pass returns a PassResult, {stage.name!r} returned {result!r}")
        seconds = time.perf_counter() - start
        after = graph_text(graph)
    except Exception as error:  # a pass is an optimisation: whatever is wrong with it, the graph compiles without it
        logger.warning("pass %s failed and was undone: %s: %s", stage.name, type(error).__name__, error, exc_info=True)
        result = PassResult(stage.name, error=f"{type(error).__name__}: {error}")
        seconds, after = time.perf_counter() - start, before
        if snapshot is not None:
            snapshot.restore()
    logger.debug(
        "pass %s: %d matches, %d replaced, %.1f ms", stage.name, result.matches, result.replaced, seconds * 1e3
    )
    return dataclasses.replace(
        result,
        name=stage.name,
        nodes_before=nodes_before,
        nodes_after=len(graph.nodes),
        seconds=seconds,
        before=before if before != after else None,
        after=after if before != after else None,
    )
