"""The calls of one key: recorded until two recordings agree, then served by the graph runtime.

A recording that the function could not repeat (it made something on its first call, it counted its calls) is thrown
away. What never settles is refused: the function runs as it is, and the report says why.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from graphcap.compiler import private
from graphcap.compiler.breakable import check
from graphcap.compiler.breakable.key import PLAIN, Arguments, plain_key
from graphcap.compiler.breakable.origin import module_names
from graphcap.compiler.breakable.program import Built, build
from graphcap.compiler.breakable.record import Kind, Recorder, difference, record
from graphcap.compiler.breakable.state import Found, Watch, changed, snapshot, walk
from graphcap.compiler.frontend.target import is_disabled
from graphcap.compiler.region import Region
from graphcap.compiler.rules import SplitRules
from graphcap.config import CUDAGraphMode
from graphcap.cudagraph import GraphRunner, device_for, graph_runner
from graphcap.errors import GuardError

log = logging.getLogger("graphcap.compiler")

MAX_RECORDINGS = 4  #: calls after which a function that differs from call to call is left alone
CHECKED_REPLAYS = 2  #: of each plan, compared with the function itself
CHECK_EVERY = 256  #: calls; then the function itself runs once more

#: Where a result's leaf comes from: ``("tensor", output)``, ``("argument", leaf)`` or ``("plain", value)``.
Leaf = tuple[str, Any]


class Entry:
    """See the module.

    Attributes:
        region: for the report.
        refused: why these calls run as they are, ``""`` as long as they are recorded or served.
    """

    def __init__(self, region: Region, roots: Callable[[], Sequence[Any]], num_own_roots: int) -> None:
        """Nothing is recorded yet.

        Args:
            region: for the report.
            roots: gives what the function's Python state is reached from.
            num_own_roots: how many of them belong to the target; the others are arguments.
        """
        self.region = region
        self.refused = ""
        self._roots = roots
        self._num_own_roots = num_own_roots
        self._watch = Watch(roots, (), self._facts())
        self._previous: Recorder | None = None
        self._num_recordings = 0
        self._unsettled = ""
        self._leaves: list[Leaf] = []
        self._spec: Any = None
        self._built: Built | None = None
        self._run: Callable[..., tuple[Any, ...]] | None = None
        self._runner: GraphRunner | None = None
        self._plan: Any = None
        self._checks_left = 0
        self._num_calls = 0

    def fits(self) -> bool:
        """Whether the Python state is what it was when this entry was made."""
        return self._watch.holds()

    def call(self, arguments: Arguments, function: Callable[[], Any], names: Callable[[], list[str]]) -> Any:
        """Serve one call.

        Args:
            arguments: of this call.
            function: runs the call as it is.
            names: of the arguments' leaves.

        Raises:
            GuardError: the function does something else than when it was recorded.
        """
        if self.refused:
            return function()
        if self._run is None:
            return self._record(arguments, function, names)
        inputs = [*arguments.tensors, *self._watch.tensors]
        if self._is_due():
            return self._check(arguments, inputs, function)
        return self._result(arguments, self._run(*inputs))

    # -- recording -----------------------------------------------------------------------------------------------------

    def _record(self, arguments: Arguments, function: Callable[[], Any], names: Callable[[], list[str]]) -> Any:
        roots = self._roots()
        before = snapshot(roots)
        recording, result = self._watched(arguments, function)
        effect = changed(before, snapshot(roots))
        del before, roots
        self._num_recordings += 1
        leaves, spec = private.tree_flatten(result)
        if recording.refusal:
            self.refuse(recording.refusal)
            return result
        sources, odd = _sources(leaves, arguments)
        if odd:
            self.refuse(odd)
            return result
        if effect:
            self._unsettled = f"a call changes {effect}, which a replay would not do"
        elif kept := recording.outlived(leaves):
            self._unsettled = kept
        elif self._previous is None:
            self._previous = recording
            self._leaves, self._spec = sources, spec
            return result
        else:
            self._unsettled = difference(self._previous, recording) or self._other_result(sources, spec)
            if not self._unsettled:
                self._prepare(arguments, recording, names())
                return result
        self._previous = None
        if self._num_recordings >= MAX_RECORDINGS:
            self.refuse(self._unsettled)
        return result

    def _watched(self, arguments: Arguments, function: Callable[[], Any], keep: bool = False) -> tuple[Recorder, Any]:
        """Run the function itself, nothing of it compiled, and watch it."""
        modules = {id(m): name for name, m in self._modules()}
        naming, disabling = module_names.set(modules), is_disabled.set(True)
        try:
            with torch.compiler.set_stance("force_eager"):
                return record(function, arguments.tensors, keep)
        finally:
            is_disabled.reset(disabling)
            module_names.reset(naming)

    def _modules(self) -> list[tuple[str, nn.Module]]:
        own = [root for root in self._roots()[: self._num_own_roots] if isinstance(root, nn.Module)]
        return [pair for root in own for pair in root.named_modules()]

    def _facts(self) -> list[Found]:
        """What must stay as it is: modules and whether they train; plain values in closures, globals and arguments."""
        facts = []
        for found in walk(self._roots()):
            assert found.path is not None
            kind, key = found.path[-1]
            mine = found.root < self._num_own_roots
            if isinstance(found.value, nn.Module) or (kind == "attribute" and key == "training"):
                facts.append(found)
            elif isinstance(found.value, PLAIN) and (not mine or kind in ("cell", "global")):
                facts.append(found)
        return facts

    def _other_result(self, sources: list[Leaf], spec: Any) -> str:
        same = spec == self._spec and len(sources) == len(self._leaves)
        if same:
            pairs = zip(sources, self._leaves, strict=True)
            same = all(
                a[0] == b[0] and (plain_key(a[1]) == plain_key(b[1]) if a[0] == "plain" else a == b) for a, b in pairs
            )
        return "" if same else "the result has another structure, or holds other numbers, in the next call"

    def _prepare(self, arguments: Arguments, recording: Recorder, names: list[str]) -> None:
        """From the recording to what serves calls from now on."""
        started = time.perf_counter()
        region, config = self.region, self.region.config
        found = self._find(recording)
        devices = {value.layout[3] for value in recording.values}
        device, why = (None, "cudagraph_mode=NONE")
        if config.cudagraph_mode is not CUDAGraphMode.NONE:
            device, why = device_for(devices, config.simulate)
        home = next((each for each in devices if each.type == "cuda"), torch.device("cpu"))
        rules = SplitRules.of(config.splitting_ops, ())
        autocast = [each for each in ("cpu", "cuda") if torch.is_autocast_enabled(each)]
        shown = [*_tensor_names(arguments, names), *self._outside_names(found, arguments, names)]
        built = build(region.name, recording, shown, home, rules, autocast)
        region.pieces, region.source, region.no_capture = built.records, built.source, why
        self._note_held(recording, found)
        self._watch = Watch(self._roots, found, self._facts())
        region.watch_tensors([each.value for each in found])
        self._built, self._previous = built, recording
        if device is None:
            self._run = built.program.run
        else:
            region.device = device.name
            # Two calls have been recorded; the runner sees the third one as its first.
            runtime = dataclasses.replace(config, capture_after=max(2, config.capture_after - 2))
            self._run = graph_runner(built.program, device, runtime, self._announced)
        region.seconds = time.perf_counter() - started
        log.info("%s: %d pieces", region.name, len(built.records))

    def _announced(self, runner: GraphRunner) -> None:
        self._runner = runner
        self.region.attach(runner)

    def _find(self, recording: Recorder) -> list[Found]:
        """Where the tensors from outside are found on later calls."""
        wanted = {id(t): t for v in recording.values if v.kind is Kind.OUTSIDE and (t := v.tensor()) is not None}
        paths: dict[int, Found] = {}
        for found in walk(self._roots()):
            if id(found.value) in wanted:
                paths.setdefault(id(found.value), found)
        return [paths.get(number, Found(0, None, tensor)) for number, tensor in wanted.items()]

    def _outside_names(self, found: Sequence[Found], arguments: Arguments, names: Sequence[str]) -> list[str]:
        opaque = arguments.opaque()
        prefixes = [name for leaf, name in zip(arguments.leaves, names, strict=True) if any(leaf is o for o in opaque)]
        shown = []
        for index, each in enumerate(found):
            number = each.root - self._num_own_roots
            prefix = f"{prefixes[number]}." if number >= 0 else ""
            shown.append(f"{prefix}{each.name}" if each.path is not None else f"held_{index}")
        return shown

    def _note_held(self, recording: Recorder, found: Sequence[Found]) -> None:
        outside = [value for value in recording.values if value.kind is Kind.OUTSIDE]
        held = [str(v.origin) for v, each in zip(outside, found, strict=True) if each.path is None]
        if held:
            self.region.notes.append(
                f"{len(held)} tensors are reached from no argument, attribute, closure or global that graphcap can see, "
                f"and are taken to be the same ones on every call; first used at {', '.join(held[:3])}"
            )

    # -- serving -------------------------------------------------------------------------------------------------------

    def _result(self, arguments: Arguments, outputs: Sequence[Any]) -> Any:
        leaves = [
            outputs[what] if kind == "tensor" else arguments.leaves[what] if kind == "argument" else what
            for kind, what in self._leaves
        ]
        return private.tree_unflatten(leaves, self._spec)

    def _is_due(self) -> bool:
        """Whether this call is one that is compared with the function itself."""
        self._num_calls += 1
        plans = self._runner.stats.plans if self._runner is not None else ()
        if plans and plans[-1] is not self._plan:
            self._plan, self._checks_left = plans[-1], CHECKED_REPLAYS
        if self._checks_left:
            self._checks_left -= 1
            return True
        return self._num_calls % CHECK_EVERY == 0

    def _check(self, arguments: Arguments, inputs: list[Any], function: Callable[[], Any]) -> Any:
        assert self._built is not None
        assert self._run is not None
        assert self._previous is not None

        def watched() -> tuple[Recorder, Any, str]:
            recording, result = self._watched(arguments, function, keep=True)
            leaves, spec = private.tree_flatten(result)
            sources, odd = _sources(leaves, arguments)
            assert self._previous is not None
            why = recording.refusal or odd or difference(self._previous, recording) or self._other_result(sources, spec)
            return recording, result, why

        outcome = check.compare(self._built, self._run, inputs, watched)
        if not outcome.difference:
            return outcome.result if outcome.outputs is None else self._result(arguments, outcome.outputs)
        settled = self._num_calls > CHECK_EVERY - 1
        self.refuse(outcome.difference)
        if settled and outcome.in_python:
            raise GuardError(
                f"{self.region.function} does something else than when it was recorded: {outcome.difference}. Up to "
                f"{CHECK_EVERY} earlier calls may have replayed what it did before. What decides this must be an "
                "argument, or the code around it an @graphcap.eager function."
            )
        return outcome.result

    def refuse(self, why: str) -> None:
        """Run these calls as they are from now on."""
        self.refused = self.region.bypass = why
        self._run = self._runner = self._built = self._previous = None
        self._watch = Watch(self._roots, (), self._facts())
        log.warning("%s is not captured and runs eager: %s", self.region.function, why)


def _sources(leaves: Sequence[Any], arguments: Arguments) -> tuple[list[Leaf], str]:
    """Where each leaf of a result comes from, and why one cannot be made again (``""`` where all can)."""
    given = {id(leaf): index for index, leaf in enumerate(arguments.leaves)}
    sources: list[Leaf] = []
    num_tensors = 0
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor):
            sources.append(("tensor", num_tensors))
            num_tensors += 1
        elif isinstance(leaf, PLAIN):
            sources.append(("plain", leaf))
        elif id(leaf) in given:
            sources.append(("argument", given[id(leaf)]))
        else:
            return (
                [],
                f"the result holds a {type(leaf).__name__}: return tensors, plain values, containers, or arguments",
            )
    return sources, ""


def _tensor_names(arguments: Arguments, names: Sequence[str]) -> list[str]:
    found: dict[int, str] = {}
    for leaf, name in zip(arguments.leaves, names, strict=True):
        if isinstance(leaf, torch.Tensor):
            found.setdefault(id(leaf), name)
    return list(found.values())
