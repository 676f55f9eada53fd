"""What padding means for one program: which sizes may grow to the next rung, and how a call is padded and cut back.

A symbol is padded only where the user declared it in every tensor that carries it. Everything else runs at its exact
size, and :attr:`Padding.refused` says why. Nothing here runs the program.

The way of a call whose sizes meet a rung: :meth:`Padding.why_not_to` (else the call is an exact one); for the first
plan of a program :func:`~graphcap.cudagraph.padded.proof.prove`, which serves the call; then a warm-up and a capture of
:meth:`Padding.pad`, both ended by :meth:`Padding.hand_back`; from then on the plan's replay fitted to the real sizes
(:mod:`~graphcap.cudagraph.padded.fitted`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from graphcap.config import Config
from graphcap.cudagraph.dispatch.revision import revise
from graphcap.cudagraph.padded.corner import Fill, corner, cut, declared_fill, fill_around
from graphcap.cudagraph.padded.eligible import declared_names, tensors, why_not_padded
from graphcap.cudagraph.padded.sizes import known_sizes, scalars_that_tell, sizes_at, strides_at, symbols_in
from graphcap.cudagraph.program import Program
from graphcap.cudagraph.recording.arena import overlap
from graphcap.cudagraph.recording.liveness import mutated_roots
from graphcap.cudagraph.recording.observe import Observation


class Padding:
    """The padding of one program.

    Attributes:
        declared: the symbols of declared dims, each with its name.
        names: the symbols that may be padded, each with the name that the user declared.
        refused: the declared symbols that are not padded, each with the reason.
        fixed: the symbols that every padded call has at this size: those of dims in buffers of the largest size.
        inputs: the tensor inputs that carry a symbol of ``names``. They never reach a graph by reference.
        scalars: the scalar inputs that depend on a symbol of ``names``, each with how.
        told_by: the scalar inputs that tell the value of a symbol, each with how it follows from it.
    """

    def __init__(self, program: Program, config: Config) -> None:
        self.program = program
        self._config = config
        self.declared = declared = declared_names(program)
        self.told_by = scalars_that_tell(program)
        self.refused = {
            symbol: reason for symbol in declared if (reason := why_not_padded(program, symbol, config.pad))
        }
        self.names = {symbol: name for symbol, name in declared.items() if symbol not in self.refused}
        self.fixed = {symbol: size for symbol, size in program.largest.items() if symbol in self.names}
        self.inputs = frozenset(i for i, spec in tensors(program) if self.names.keys() & symbols_in(spec.sizes))
        self.scalars = {index: size for index, size in self.told_by.items() if size.symbol in self.names}
        self._put_off: set[str] = set()
        self._output_sizes = dict(zip(program.outputs, program.output_sizes, strict=bool(self.names)))

    @property
    def notes(self) -> tuple[str, ...]:
        """One line for each thing that a user who wants padding should know."""
        return tuple(self._notes(self.declared))

    def __bool__(self) -> bool:
        return bool(self.names)

    def sizes(self, args: Sequence[Any]) -> dict[str, int] | None:
        """The value of every symbol in this call; ``None`` where two arguments contradict each other."""
        found: dict[str, int] = {}
        for index, size in self.told_by.items():
            value = size.symbol_at(args[index])
            if size.at(value) != args[index] or found.setdefault(size.symbol, value) != value:
                return None
        return found

    def why_not_to(self, rung: Mapping[str, int], args: Sequence[Any]) -> str:
        """Why this call cannot be padded to a rung (a size per symbol); ``""`` where it can. Runs nothing."""
        real = self.sizes(args)
        if real is None:
            return "arguments whose sizes should agree do not"
        goal = self._goal(real, rung)
        for symbol, size in goal.items():
            if symbol in self.names and not 1 <= real[symbol] <= size:
                return f"{self.names[symbol]} is {real[symbol]}, the plan is for up to {size}"
        for index in self.inputs:
            spec, tensor = self.program.inputs[index], args[index]
            if type(tensor) is not torch.Tensor or tensor.layout is not torch.strided:
                return f"{spec.name} is a {type(tensor).__name__} with layout {tensor.layout}"
            if tensor.shape != sizes_at(spec.sizes, real):
                return f"{spec.name} has the size {tuple(tensor.shape)}, expected {tuple(sizes_at(spec.sizes, real))}"
            nbytes = sizes_at(spec.sizes, goal).numel() * tensor.element_size()
            if nbytes > self._config.max_copy_bytes:
                return f"{spec.name} would be copied, and {nbytes} bytes are above max_copy_bytes"
        return ""

    def why_not_copied(self, args: Sequence[Any], seen: Observation) -> str:
        """Why padded inputs cannot have memory of their own: what is written into one must show in another argument.
        ``""`` where they can. ``seen``: a warm-up, which knows what is written."""
        for index in self.written(seen):
            for other, value in enumerate(args):
                if other != index and isinstance(value, torch.Tensor) and overlap(args[index], value):
                    names = self.program.inputs[index].name, self.program.inputs[other].name
                    return f"{names[0]} is written and shares memory with {names[1]}"
        return ""

    def pad(self, args: Sequence[Any], rung: Mapping[str, int]) -> list[Any]:
        """The arguments at the sizes of a rung: padded inputs in fresh memory, filled, and scalars replaced.

        Args:
            args: of a call for which :meth:`why_not_to` has no reason.
            rung: per symbol of ``names`` its size; symbols that are left out stay as they are, those of ``fixed`` have
                their largest size.

        Raises:
            Exception: what a fill raises.
        """
        goal = self.goal(args, rung)
        padded = list(args)
        for index, size in self.scalars.items():
            padded[index] = size.at(goal[size.symbol])
        with torch.inference_mode(False), torch.no_grad():
            for index in self.inputs:
                spec, tensor = self.program.inputs[index], args[index]
                fresh = torch.empty_strided(
                    sizes_at(spec.sizes, goal), strides_at(spec, goal), dtype=tensor.dtype, device=tensor.device
                )
                corner(fresh, tensor.shape).copy_(tensor.detach())
                fill_around(fresh, tensor.shape, self.fill(index))
                padded[index] = fresh
        return padded

    def goal(self, args: Sequence[Any], rung: Mapping[str, int]) -> dict[str, int]:
        """Every symbol's size in the padded call."""
        return self._goal(self.sizes(args) or {}, rung)

    def hand_back(
        self, args: Sequence[Any], padded: Sequence[Any], outputs: Sequence[Any], seen: Observation
    ) -> tuple[Any, ...]:
        """End a padded call: real rows that were written go into the caller's tensors, outputs are cut to real size.

        Args:
            args: the caller's.
            padded: what :meth:`pad` made of them, after the call.
            outputs: of the padded call.
            seen: a warm-up, which knows what is written.
        """
        with torch.no_grad():
            for index in self.written(seen):
                args[index].copy_(corner(padded[index], args[index].shape))
        return self.cut(args, outputs)

    def written(self, seen: Observation) -> list[int]:
        """The padded inputs that a step writes into."""
        mutated = mutated_roots(self.program, seen.roots)
        return sorted(index for index in self.inputs if seen.roots[index] in mutated)

    def cut(self, args: Sequence[Any], outputs: Sequence[Any]) -> tuple[Any, ...]:
        """The outputs of a padded call at the sizes of the real one. An argument that is returned is the caller's."""
        real = {symbol: size for symbol, size in (self.sizes(args) or {}).items() if symbol in self.names}
        made: dict[int, Any] = {}
        for slot, value in zip(self.program.outputs, outputs, strict=True):
            if isinstance(slot, int) and slot < len(args):
                made[slot] = args[slot]
            elif isinstance(slot, int) and slot not in made:
                made[slot] = cut(value, self.size_of_output(slot, real)) if isinstance(value, torch.Tensor) else value
        pairs = zip(self.program.outputs, outputs, strict=True)
        return tuple(made[slot] if isinstance(slot, int) else value for slot, value in pairs)

    def size_of_input(self, index: int, sizes: Mapping[str, int]) -> tuple[int | None, ...]:
        """The size of an input where symbols have these sizes; ``None`` for dims that follow none of them."""
        return known_sizes(self.program.inputs[index].sizes, sizes)

    def size_of_output(self, slot: int, sizes: Mapping[str, int]) -> tuple[int | None, ...]:
        """The same for an output."""
        return known_sizes(self._output_sizes.get(slot, ()), sizes)

    def follows(self, slot: int, symbols: Collection[str]) -> bool:
        """Whether the size of an output follows one of these symbols."""
        return not symbols_in(self._output_sizes.get(slot, ())).isdisjoint(symbols)

    def inputs_of(self, rung: Collection[str]) -> frozenset[int]:
        """The inputs that carry one of these symbols."""
        carried = {index: symbols_in(self.program.inputs[index].sizes) for index in self.inputs}
        return frozenset(index for index, symbols in carried.items() if not symbols.isdisjoint(rung))

    def refuse(self, symbols: Iterable[str], reason: str) -> None:
        """Never pad these again: a fact that a proof found, such as rows that are mixed."""
        for symbol in symbols:
            if self.names.pop(symbol, None) is not None:
                self.refused[symbol] = reason
                self.fixed.pop(symbol, None)
        revise()

    def put_off(self, symbols: Iterable[str], reason: str) -> None:
        """Do not pad these for now: a proof was not possible as things are, and nothing is known against it."""
        symbols = [symbol for symbol in symbols if symbol in self.names]
        self.refuse(symbols, reason)
        self._put_off.update(symbols)

    def reconsider(self) -> set[str]:
        """Let what was put off be proven. Returns the symbols, which may be padded from now on."""
        symbols, self._put_off = self._put_off, set()
        for symbol in symbols:
            del self.refused[symbol]
            self.names[symbol] = self.declared[symbol]
            if symbol in self.program.largest:
                self.fixed[symbol] = self.program.largest[symbol]
        revise()
        return symbols

    def fill(self, index: int) -> Fill:
        """What the padded rows of an input hold; 0 where nothing is declared."""
        given = self.declared_fill(index)
        return 0 if given is None else given

    def declared_fill(self, index: int) -> Fill | None:
        """What ``pad`` says about an input; ``None`` where that is nothing."""
        return declared_fill(self._config.pad, self.program.inputs[index].name)

    def undeclared_write_indices(self) -> list[str]:
        """The inputs that say where something is written, and for which no declaration says where padded rows write."""
        indices = [(index, spec) for index, spec in tensors(self.program) if spec.is_write_index]
        return [spec.name for index, spec in indices if self.declared_fill(index) is None or not spec.dim_names]

    def _goal(self, real: Mapping[str, int], rung: Mapping[str, int]) -> dict[str, int]:
        return {**real, **{s: size for s, size in rung.items() if s in self.names}, **self.fixed}

    def _why_nothing_is_declared(self) -> str:
        if not self._config.dynamic_arg_dims:
            return "no dim is declared in dynamic_arg_dims"
        if self.told_by:
            return "no argument of this graph is in dynamic_arg_dims (behind a graph break, arguments have other names)"
        return "this graph took the sizes of its first call as constants; another size is traced anew"

    def _notes(self, declared: Mapping[str, str]) -> Iterator[str]:
        if not declared and self._config.capture_sizes:
            yield f"capture_sizes lists exact sizes, nothing is padded: {self._why_nothing_is_declared()}"
        for symbol, reason in self.refused.items():
            yield f"{declared[symbol]} is not padded: {reason}"
