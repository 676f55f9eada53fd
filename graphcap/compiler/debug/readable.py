"""Graphs as text for people: what the dumps write and tlparse shows. Nothing here depends on time, process or cache."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from graphcap.compiler.split import Piece


def graph_text(gm: fx.GraphModule) -> str:
    """A graph module as Python, with the user's lines as comments and shape, stride and device of every value."""
    return gm.print_readable(print_output=False, include_stride=True, include_device=True).strip() + "\n"


def split_text(gm: fx.GraphModule, pieces: Sequence[Piece]) -> str:
    """The graph after the split: one method that calls the pieces in order, then each piece."""
    taken = [node.name for node in gm.graph.nodes if node.op == "placeholder"]
    returned = next(node for node in reversed(gm.graph.nodes) if node.op == "output").args[0]
    lines = [f"# {len(pieces)} pieces in execution order", "class Split(torch.nn.Module):"]
    lines.append(f"    def forward({', '.join(['self', *taken])}):")
    for piece in pieces:
        results = "".join(f"{node.name}, " for node in piece.outputs)
        call = f"self.{piece.name}({', '.join(node.name for node in piece.inputs)})"
        lines.append(f"        # {verdict_line(piece)}")
        lines.append(f"        {results + '= ' if results else ''}{call}")
    lines.append(f"        return {returned}")
    return "\n\n\n".join(["\n".join(lines), *(graph_text(piece.module).strip() for piece in pieces)]) + "\n"


def verdict_line(piece: Piece) -> str:
    """One line: how a piece runs, why, and where the user wrote it."""
    facts = (piece.verdict.kind, piece.reason, piece.module_path, piece.source)
    return f"{piece.name}: {' | '.join(fact for fact in facts if fact)}"


def piece_text(piece: Piece, twins: Sequence[str], mutated: Sequence[str], key: str) -> str:
    """A piece's graph under a header of what is known about it.

    Args:
        piece: the piece.
        twins: the names of the later pieces that share its artifact.
        mutated: the names of the inputs that it writes.
        key: the content key of its artifact, ``""`` without one.
    """
    header = [f"# {verdict_line(piece)}"]
    if twins:
        header.append(f"# x{len(twins) + 1}: the same code runs as {', '.join(twins)}")
    if mutated:
        header.append(f"# writes its inputs {', '.join(mutated)}")
    if key:
        header.append(f"# artifact {key}")
    return "\n".join(header) + "\n" + graph_text(piece.module)
