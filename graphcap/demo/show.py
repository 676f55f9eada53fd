"""What ``graphcap demo`` prints."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass
from typing import Any

import torch

from graphcap.compiler.debug.report import Report
from graphcap.demo.compare import Verdict
from graphcap.demo.decode import Run, Step
from graphcap.demo.settings import Settings

SIMULATED = (
    "No GPU here: graphs are captured and replayed on the SIMULATED device. That checks decisions and values;\n"
    "its times say nothing about speed, so no speedup is given."
)
MEANINGS = {
    "compile": "Dynamo traced, pieces were compiled or loaded from the cache",
    "capture": "graphs were captured",
    "replay": "graphs were replayed",
    "live": "ran without a graph: warm-up of a shape, or a shape that is not captured",
}


@dataclass(frozen=True)
class Outcome:
    """Everything that was found out. ``eager`` and ``ours`` hold one run per prompt."""

    settings: Settings
    model: dict[str, Any]
    eager: list[Run]
    ours: list[Run]
    verdict: Verdict
    report: Report

    @property
    def simulated(self) -> bool:
        """Whether graphs ran on the simulated device."""
        return self.settings.device.type == "cpu"

    @property
    def where_time_went(self) -> dict[str, list[Step]]:
        """graphcap's steps of all prompts, by how they were served."""
        steps = [step for run in self.ours for step in run.steps]
        return {kind: [step for step in steps if step.served == kind] for kind in MEANINGS}

    @property
    def decode_ms(self) -> tuple[float, float]:
        """Median milliseconds of a decode step of the last prompt: eager, graphcap."""
        eager, ours = (statistics.median(s.seconds for s in runs[-1].steps[1:]) for runs in (self.eager, self.ours))
        return eager * 1e3, ours * 1e3

    def to_dict(self) -> dict[str, Any]:
        """The whole outcome as JSON knows it; on the simulated device without any comparison of speed."""
        eager_ms, ours_ms = self.decode_ms
        speed = {"eager_ms": eager_ms, "graphcap_ms": ours_ms, "speedup": eager_ms / ours_ms}
        return {
            "agrees": self.verdict.agrees,
            "verdict": asdict(self.verdict),
            "device": _device_name(self.settings.device),
            "simulated": self.simulated,
            "torch": torch.__version__,
            "model": self.model,
            "run": _choices(self.settings),
            "steps": {
                kind: {"count": len(steps), "seconds": sum(step.seconds for step in steps)}
                for kind, steps in self.where_time_went.items()
            },
            "decode_step": None if self.simulated else speed,
            "report": self.report.to_dict(),
        }


def text_of(outcome: Outcome) -> str:
    """The report for a reader."""
    model, device = outcome.model, _device_name(outcome.settings.device)
    choices = ", ".join(f"{name} {value}" for name, value in _choices(outcome.settings).items())
    lines = [
        f"{model['class']}, {model['parameters'] / 1e6:.1f} M parameters (weights: {model['weights']}) on {device}",
        choices,
        *([SIMULATED] if outcome.simulated else []),
        "",
        str(outcome.report),
        "",
        "Where graphcap's time went, both prompts:",
        *_time_lines(outcome),
        "",
        f"{'OK' if outcome.verdict.agrees else 'WRONG'}: {outcome.verdict.text}",
        *([] if outcome.simulated else [_speed_line(outcome)]),
    ]
    return "\n".join(lines)


def _time_lines(outcome: Outcome) -> list[str]:
    lines = []
    for kind, steps in outcome.where_time_went.items():
        seconds = [step.seconds for step in steps]
        median = f"median {statistics.median(seconds) * 1e3:9.2f} ms" if steps else " " * 19
        lines.append(f"  {kind:<8} {len(steps):4} steps {sum(seconds):8.2f} s  {median}  {MEANINGS[kind]}")
    return lines


def _speed_line(outcome: Outcome) -> str:
    eager_ms, ours_ms = outcome.decode_ms
    return (
        f"Median decode step of the second prompt: eager {eager_ms:.2f} ms, graphcap {ours_ms:.2f} ms: "
        f"{eager_ms / ours_ms:.2f} x"
    )


def _choices(settings: Settings) -> dict[str, Any]:
    return {
        "dtype": str(settings.dtype).removeprefix("torch."),
        "cache": settings.cache,
        "batch": settings.batch,
        "tokens": settings.new_tokens,
    }


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
