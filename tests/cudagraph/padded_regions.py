"""Programs with declared dims, built by hand, and what a runner does with one: prove, warm up, capture, fit, replay."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from graphcap.config import Config
from graphcap.cudagraph import Capture, Constant, GraphDevice, InputKind, InputSpec, Program, Size
from graphcap.cudagraph.counters.stats import PlanStats
from graphcap.cudagraph.dispatch.route import Batch, Route
from graphcap.cudagraph.dispatch.routes import FULL
from graphcap.cudagraph.hardware.simulated import SimulatedDevice
from graphcap.cudagraph.padded.fitted import Fitter
from graphcap.cudagraph.padded.padding import Padding
from graphcap.cudagraph.padded.proof import Verdict, prove
from graphcap.cudagraph.recording.arena import Arena
from graphcap.cudagraph.recording.bindings import Choice
from graphcap.cudagraph.recording.bridges import BridgeSpace
from graphcap.cudagraph.recording.capture import SegmentedCapture
from graphcap.cudagraph.recording.in_place import InPlace
from graphcap.cudagraph.recording.layout import lay_out
from graphcap.cudagraph.recording.observe import Observation, observe
from graphcap.cudagraph.recording.recorded import Recorded
from graphcap.cudagraph.replaying.handout import Policy
from graphcap.cudagraph.replaying.plan import Plan, static_addresses
from graphcap.cudagraph.replaying.replay import generate
from graphcap.progress import Progress
from tests.cudagraph.regions import Region

N = Size("n")
CPU = torch.device("cpu")
LIVE = Capture.NEVER
SILENT = Progress("", 0, enabled=False)


class PaddedRegion(Region):
    """A region whose inputs say what their sizes follow: ``Size`` objects, dims of which are declared by default."""

    def __init__(self) -> None:
        super().__init__()
        self.size("n")

    def rows(
        self, name: str, *rest: Any, size: Any = N, declared: bool = True, index: bool = False, **spec: Any
    ) -> int:
        """A tensor ``[size, *rest]``."""
        sizes = (size, *rest)
        names = {dim: each.symbol for dim, each in enumerate(sizes) if isinstance(each, Size)} if declared else {}
        spec = {"sizes": sizes, "dim_names": names, "is_write_index": index} | spec
        return self._input(InputSpec(name, InputKind.TENSOR, **spec))

    def state(self, name: str, *sizes: Any, kind: InputKind = InputKind.TENSOR) -> int:
        """A tensor whose size does not follow a batch."""
        return self._input(InputSpec(name, kind, sizes=sizes))

    def program(
        self, *outputs: int | Constant, sizes: Sequence[Any], largest: Mapping[str, int] | None = None
    ) -> Program:
        """The program with the sizes of its outputs."""
        plain = self.returning(*outputs)
        return Program(
            "region", plain.inputs, plain.steps, plain.outputs, plain.run, tuple(map(tuple, sizes)), largest or {}
        )


def padding_of(program: Program, **settings: Any) -> Padding:
    return Padding(program, Config(**settings))


def proof_of(
    program: Program, args: Sequence[Any], rung: int | Mapping[str, int], *, max_bytes: int = 2**30, **settings: Any
) -> Verdict:
    """The verdict about one call; it is served once."""
    padding = padding_of(program, **settings)
    sizes = {"n": rung} if isinstance(rung, int) else rung
    assert padding, padding.refused
    assert not padding.why_not_to(sizes, args)
    device = next(arg.device for arg in args if isinstance(arg, torch.Tensor))
    seen, _ = observe(program, cloned(args), device)
    return prove(program, args, padding, sizes, seen, device, max_bytes)


def cloned(args: Sequence[Any]) -> list[Any]:
    return [arg.clone() if isinstance(arg, torch.Tensor) else arg for arg in args]


def warm_up_padded(
    program: Program, args: Sequence[Any], padding: Padding, rung: Mapping[str, int], device: torch.device
) -> Observation:
    """Serve a call live at the size of a rung; what a capture there must know."""
    padded = padding.pad(args, rung)
    seen, outputs = observe(program, padded, device)
    padding.hand_back(args, padded, outputs, seen)
    return seen


class PaddedCalls:
    """A runner that does one thing: it keeps a plan for each rung and serves each call from the smallest that fits."""

    def __init__(
        self, program: Program, *, device: GraphDevice | None = None, full: bool = True, **settings: Any
    ) -> None:
        self.program, self.full = program, full
        self.config = Config(**settings)
        self.padding = Padding(program, self.config)
        self.device: GraphDevice = device or SimulatedDevice()
        self.arena = Arena(self.device)
        self.bridges = BridgeSpace(self.device)
        self.in_place = InPlace()
        self.plans: dict[tuple[int, ...], Plan] = {}
        self.mismatches: list[str] = []
        assert self.padding, self.padding.refused

    def capture(self, rung: Mapping[str, int], args: Sequence[Any]) -> tuple[Any, ...]:
        """Warm up with copies of the arguments, capture with the arguments; the outputs of the capturing call."""
        known = warm_up_padded(self.program, cloned(args), self.padding, rung, self.device.device)
        choice = Choice(self.full, {}, (), (), self.config.max_copy_bytes, padded=self.padding.inputs)
        layout = lay_out(self.program, known, choice)
        padded = self.padding.pad(args, rung)
        with contextlib.ExitStack() as session, torch.no_grad():
            pool = session.enter_context(self.device.session())
            capture = SegmentedCapture(self.program, known, layout, self.device, pool, padded)
            capture.bind_inputs(self.arena, self.bridges, self.in_place)
            outputs, failure = capture.run(SILENT, Policy.of(self.config, False))
        assert failure is None, failure
        recorded = capture.recorded
        handed = self.padding.hand_back(args, padded, outputs, known)
        fitter = Fitter(self.padding, self.padding.goal(args, rung), recorded, self.arena)
        self.plans[tuple(rung.values())] = self._plan(tuple(rung.values()), rung, recorded, fitter)
        return handed

    def capture_exact(self, args: Sequence[Any]) -> Plan:
        """A plan for the very sizes of a call, beside the padded ones."""
        seen, _ = observe(self.program, cloned(args), self.device.device)
        layout = lay_out(self.program, seen, Choice(self.full, {}, (), (), self.config.max_copy_bytes))
        with self.device.session() as pool, torch.no_grad():
            capture = SegmentedCapture(self.program, seen, layout, self.device, pool, args)
            capture.bind_inputs(self.arena, self.bridges, self.in_place)
            _, failure = capture.run(SILENT, Policy.of(self.config, False))
        assert failure is None, failure
        return self._plan((), {}, capture.recorded, None)

    def _plan(self, sizes: tuple[int, ...], rung: Mapping[str, int], recorded: Recorded, fitter: Fitter | None) -> Plan:
        at_end = self.device.at_end(recorded.segments, recorded.outputs.lent())
        if at_end is not None:
            at_end()
        replay, source = generate(recorded, at_end, self.mismatches.append, self.arena, fitter)
        route = Route(FULL, Batch(), sizes, rung, {}, True)
        stats = PlanStats((), "", 0, [], {}, 0, 0.0)
        holding = self.device.account.open(0, self.device, lambda: None)
        return Plan(route, replay, source, static_addresses(recorded), recorded, stats, holding, fitter=fitter)

    def __call__(self, *args: Any) -> tuple[Any, ...]:
        real = self.padding.sizes(args)
        assert real is not None
        wanted = [real[symbol] for symbol in self.padding.names]
        rung = min(r for r in self.plans if all(a >= b for a, b in zip(r, wanted, strict=True)))
        with torch.no_grad():
            result = self.plans[rung].fit(real)(args)
        assert isinstance(result, tuple), result
        return result
