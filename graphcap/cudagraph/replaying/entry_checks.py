"""What a generated replay asks of its arguments before it touches anything."""

from __future__ import annotations

from graphcap import native
from graphcap.cudagraph.private import storage_address
from graphcap.cudagraph.program import InputKind
from graphcap.cudagraph.recording.bindings import Binding
from graphcap.cudagraph.recording.liveness import mutated_roots
from graphcap.cudagraph.recording.recorded import padded_inputs_written
from graphcap.cudagraph.replaying.lines import Lines
from graphcap.cudagraph.replaying.plan import static_addresses

#: The inputs that are used in place, and the address of each.
Places = tuple[list[int], list[int]]


def write_checks(lines: Lines) -> Places | None:
    """Addresses of what is used in place; layouts of what may change between calls; which of them share memory.

    Returns:
        What the check of addresses compares; ``None`` where nothing is used in place.
    """
    addresses = static_addresses(lines.recorded)
    places: Places | None = None
    static = [index for index, address in enumerate(addresses) if address is not None]
    if static:
        places = static, [address for address in addresses if address is not None]
        lines.line("if not addresses_hold(args): return MOVED", addresses_hold=native.address_check(*places))
    _layout_checks(lines, static)
    _alias_checks(lines)
    _relation_checks(lines)
    _lent_checks(lines)
    return places


def _layout_checks(lines: Lines, static: list[int]) -> None:
    """Size, dtype, device and strides of what may change between calls. Tensors that look exactly like those of the
    call before need one look; the lines below it say what is allowed."""
    inputs, stand_ins = lines.recorded.program.inputs, lines.recorded.stand_ins
    looked_at = [
        index
        for index in stand_ins
        if index < len(inputs)
        and (index in lines.padded or index not in static or inputs[index].kind is InputKind.TENSOR)
    ]
    if not looked_at:
        return
    names = ", ".join(map(lines.argument_or_result, looked_at))
    lines.line("global same")  # each replay has globals of its own
    lines.line(f"if not same({names}):", same=lambda *tensors: False, layout_check=native.layout_check)
    for index in looked_at:
        name, stand_in = lines.argument_or_result(index), stand_ins[index]
        condition = f"{name}.shape != SIZE{index} or {name}.dtype is not DTYPE{index} or {name}.device != DEVICE"
        lines.names |= {f"DTYPE{index}": stand_in.dtype, "DEVICE": stand_in.device}
        if index not in lines.padded:  # those are copied row by row, so that their strides do not matter
            condition += f" or {name}.stride() != STRIDE{index}"
            lines.names |= {f"SIZE{index}": stand_in.size(), f"STRIDE{index}": stand_in.stride()}
        lines.line(f"    if {condition}: return CHANGED")
    lines.line(f"    same = layout_check([{names}])")


def _alias_checks(lines: Lines) -> None:
    """A copy must not hide from a captured step what another step writes into the original."""
    recorded, layout = lines.recorded, lines.recorded.layout
    roots = recorded.seen.roots
    mutated = mutated_roots(recorded.program, roots)
    written = [index for index in layout.inputs_bound(Binding.STATIC) if roots[index] in mutated]
    places = {storage_address(recorded.stand_ins[index]) for index in written} - {0}
    written_copies = padded_inputs_written(recorded)
    copied = layout.inputs_bound(Binding.COPIED, Binding.PADDED) if places else []
    for index in copied:
        name = lines.argument_or_result(index)
        lines.line(f"if {_storage(name)} in WRITTEN: return CHANGED", WRITTEN=places)
    elsewhere = {i for i, root in enumerate(roots[: len(layout.bindings)]) if root in mutated} - {*written}
    if lines.padded and (others := sorted(elsewhere - {*lines.padded})):
        storages = ", ".join(_storage(lines.argument_or_result(other)) for other in others)
        lines.line(f"written = ({storages},)")  # once: a cache in each layer, for each padded input
        for index in lines.padded:
            lines.line(f"if ({_storage(lines.argument_or_result(index))} or None) in written: return CHANGED")
    for index in (*layout.inputs_bound(Binding.COPIED_BACK), *written_copies):
        others = [other for other, root in enumerate(roots[: len(layout.bindings)]) if root >= 0 and other != index]
        if others:
            storages = ", ".join(_storage(lines.argument_or_result(other)) for other in others)
            name = lines.argument_or_result(index)
            lines.line(f"if ({_storage(name)} or None) in ({storages},): return CHANGED")


def _relation_checks(lines: Lines) -> None:
    """Arguments that shared memory at capture must share it in the same way: which of them a result is or views was
    learned from that call."""
    static = lines.recorded.layout.inputs_bound(Binding.STATIC)
    _, shared, same = lines.recorded.seen.signature
    for index, first in same:
        lines.line(f"if {lines.value(index)} is not {lines.value(first)}: return CHANGED")
    for index, root, distance in shared:
        if index not in static or root not in static:
            one, other = lines.value(index), lines.value(root)
            lines.line(
                f"if {one}.data_ptr() - {other}.data_ptr() != {distance} "
                f"or {_storage(one)} != {_storage(other)}: return CHANGED"
            )


def _lent_checks(lines: Lines) -> None:
    """An argument that lies in the plan's own outputs is overwritten while the plan runs: only what is copied in
    before that may be one."""
    recorded, layout = lines.recorded, lines.recorded.layout
    lent = recorded.outputs.lent()
    if not lent:
        return
    read_live = {slot for number in layout.live for slot in recorded.program.steps[number].reads}
    late = read_live & {*layout.inputs_bound(Binding.COPIED, Binding.REFERENCE)}
    for index in sorted(late.union(layout.inputs_bound(Binding.COPIED_BACK))):
        name = lines.value(index)
        place = f"place_of({name})" if index in recorded.seen.foreign else _storage(name)
        lines.line(f"if {place} in LENT: return CHANGED", LENT=lent, place_of=storage_address)


def _storage(name: str) -> str:
    return f"{name}.untyped_storage().data_ptr()"
