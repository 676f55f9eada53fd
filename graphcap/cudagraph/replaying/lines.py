"""The lines of a generated replay while it is written, and the names that they use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from graphcap.cudagraph.padded.fitted import Fitter
from graphcap.cudagraph.recording.arena import flat, overlaps_itself
from graphcap.cudagraph.recording.bindings import Binding
from graphcap.cudagraph.recording.recorded import Recorded
from graphcap.cudagraph.replaying.plan import Unfit


class Lines:
    """Collects the lines of one function.

    Attributes:
        recorded: what the function replays.
        fitter: of a padded plan.
        padded: the padded inputs.
        names: the globals of the function.
        natives: what makes some of them from the others, again where these differ and when there is an extension.
        used: arguments that need a local variable.
    """

    def __init__(self, recorded: Recorded, fitter: Fitter | None) -> None:
        self.recorded = recorded
        self.fitter = fitter
        self.padded = recorded.layout.inputs_bound(Binding.PADDED)
        self.lines: list[str] = []
        self.used: dict[int, None] = {}
        self.natives: dict[str, Callable[[Mapping[str, Any]], Any]] = {}
        self.names: dict[str, Any] = {"MOVED": Unfit.MOVED, "CHANGED": Unfit.CHANGED, "flat": flat}
        if fitter is not None:
            self.names |= fitter.names(fitter.rung)

    def line(self, text: str, **names: Any) -> None:
        """Add a line; ``names`` are what it finds under these names."""
        self.lines.append(text)
        self.names |= names

    def value(self, slot: int) -> str:
        """The name under which live code finds a slot."""
        if slot in self.padded:
            self.names[f"b{slot}"] = self.recorded.stand_ins[slot]
            return f"b{slot}"
        if self.fitter is not None and slot in self.fitter.scalars:
            self.names[f"n{slot}"] = self.fitter.scalars[slot]
            return f"n{slot}"
        return self.argument_or_result(slot)

    def argument_or_result(self, slot: int) -> str:
        """The name of what the caller gave, or of what a step left."""
        if slot < len(self.recorded.program.inputs):
            self.used[slot] = None
            return f"a{slot}"
        if slot in self.recorded.constants:
            self.names[f"c{slot}"] = self.recorded.constants[slot]
            return f"c{slot}"
        return f"v{slot}"

    def copy_operands(self, slot: int) -> tuple[str, str]:
        """Between which names a value is copied into the memory that stands for it: from, to."""
        stand_in, name = self.recorded.stand_ins[slot], self.argument_or_result(slot)
        if slot in self.padded:
            return name, f"t{slot}"
        overlaps = overlaps_itself(stand_in)
        self.names[f"b{slot}"] = flat(stand_in) if overlaps else stand_in
        return (f"flat({name})" if overlaps else name), f"b{slot}"
