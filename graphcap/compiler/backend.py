"""The backend: a Dynamo graph comes in, one callable comes out. Read :func:`compile_region` first.

=====================  ==================================================================================
step                   room
=====================  ==================================================================================
who asks, which sizes  ``region.py``, ``symbols.py``
before the cut         ``inputs.py`` (names), ``attention_masks.py``
where to cut           ``rules.py`` (which ops), ``eager_functions.py``, ``partition.py`` (grouping), ``split.py``
compile each piece     ``pieces.py``, ``canonical.py`` (twins, key), ``inductor.py``, the ``passes`` and ``cache`` rooms
sew together           ``stitch.py``, ``dims.py`` (what the user declared about sizes)
capture and replay     the ``cudagraph`` room
show it                the ``debug`` folder
=====================  ==================================================================================
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from graphcap.compiler import nodes, private
from graphcap.compiler.attention_masks import make_masks_additive
from graphcap.compiler.bypass import reason_to_bypass, run_bypass
from graphcap.compiler.debug import dump
from graphcap.compiler.dims import GraphDims, read_dims
from graphcap.compiler.frontend.marked_call import will_retry
from graphcap.compiler.inductor_settings import check_inductor_settings
from graphcap.compiler.inputs import name_inputs
from graphcap.compiler.limits import bound_sizes
from graphcap.compiler.partition import partition
from graphcap.compiler.pieces import compile_pieces
from graphcap.compiler.region import Region, close_region, open_region, went_beyond
from graphcap.compiler.rules import SplitRules
from graphcap.compiler.specialise import by_size, position_of, specialisable_symbol
from graphcap.compiler.split import Piece, split
from graphcap.compiler.split_names import names_that_match
from graphcap.compiler.stitch import build_program
from graphcap.compiler.symbols import SizeSymbols, analyse_sizes
from graphcap.config import Config, CUDAGraphMode
from graphcap.cudagraph import GraphDevice, Program, device_for, graph_runner
from graphcap.errors import GraphcapError

log = logging.getLogger(__name__)


def graphcap(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | Config | None = None,
) -> Callable[..., Any]:
    """The ``torch.compile`` backend. Found by name through the entry point ``torch_dynamo_backends``.

    Args:
        gm: the graph that Dynamo traced; parameters and buffers are inputs.
        example_inputs: the first call's inputs, one per placeholder.
        mode: torch's ``mode=``.
        options: fields of :class:`graphcap.Config`, or one.

    Returns:
        A callable of the same inputs.

    Raises:
        ConfigError: for options that do not exist or do not fit.
        RecompileError: in DYNAMO_TRACE_ONCE, at a second trace.
        PassRequiredError: when a required pass matched nothing.
    """
    config = Config.resolve(options, mode)
    check_inductor_settings(config)
    region = open_region(gm, example_inputs, config)
    region.bypass = reason_to_bypass(gm, example_inputs, config)
    try:
        return compile_or_bypass(gm, example_inputs, region)
    except Exception as error:
        if private.restarts_trace(error):
            close_region(region)
        raise


def compile_or_bypass(gm: fx.GraphModule, example_inputs: Sequence[Any], region: Region) -> Callable[..., Any]:
    """Compile one graph through our pipeline, or through Inductor alone where there is a reason to."""
    if region.bypass:
        return run_bypass(gm, example_inputs, region)
    try:
        return compile_region(gm, example_inputs, region)
    except GraphcapError:
        raise
    except Exception as error:  # a fault of ours must not take the model down
        if will_retry(error) or private.restarts_trace(error):
            raise
        log.warning("%s: graphcap failed and Inductor takes over: %s", region.name, error, exc_info=True)
        region.bypass = f"graphcap failed: {type(error).__name__}: {error}"
        return run_bypass(gm, example_inputs, region)


def compile_region(gm: fx.GraphModule, example_inputs: Sequence[Any], region: Region) -> Callable[..., Any]:
    """Split, compile, stitch and capture one graph."""
    started, config = time.perf_counter(), region.config
    log.info("%s: %s, %d nodes", region.name, region.location, len(gm.graph.nodes))
    name_inputs(gm.graph, region.owner)
    dumper = dump.open_dump(region)
    dumper.graph("before_split", gm)
    make_masks_additive(gm.graph)

    devices = devices_of(gm.graph)
    device, region.no_capture = capture_device(devices, config)
    sizes = analyse_sizes(gm.graph)
    region.bounds = {} if went_beyond(region) else bound_sizes(gm.graph, sizes)
    region.split_names = names_that_match(config.splitting_ops or (), gm.graph)
    rules = SplitRules.of(config.splitting_ops, config.splitting_rules)
    groups = partition(gm.graph, rules, sizes, home_device(devices))
    pieces = split(gm, groups, sizes)
    dumper.split(gm, pieces)

    compiled = compile_pieces(pieces, config, home_device(devices))
    region.record_pieces(pieces, compiled, sizes)

    dims = read_dims(gm.graph, example_inputs, config.dynamic_arg_dims)
    program, region.source = build_program(
        region.name, gm.graph, pieces, compiled, example_inputs, sizes, dims, region.bounds
    )
    run = capturing(program, device, region)
    run = with_special_sizes(run, gm.graph, pieces, example_inputs, sizes, region, device)

    region.seconds = time.perf_counter() - started
    dumper.close(pieces, compiled)
    log.info("%s: %d pieces, %.2f s", region.name, len(pieces), region.seconds)
    return run


def with_special_sizes(
    general: Callable[..., Any],
    graph: fx.Graph,
    pieces: Sequence[Piece],
    example_inputs: Sequence[Any],
    sizes: SizeSymbols,
    region: Region,
    device: GraphDevice | None,
) -> Callable[..., Any]:
    """Compile the pieces again for each of ``compile_sizes``, and choose by size."""
    config, symbol = region.config, specialisable_symbol(sizes)
    if not config.compile_sizes:
        return general
    if symbol is None:
        region.notes.append(f"compile_sizes is ignored: it needs one size in the graph key, here are {len(sizes.key)}")
        return general
    special = {}
    for size in config.compile_sizes:
        compiled = compile_pieces(pieces, config, home_device(devices_of(graph)), at=(symbol, size))
        name, dims = f"{region.name}_at_{size}", GraphDims()  # no dim is declared: this code is for one size
        program, _ = build_program(name, graph, pieces, compiled, example_inputs, sizes, dims, {})
        special[size] = capturing(program, device, region)
        region.notes.append(f"compiled for {symbol} = {size} too")
    return by_size(general, special, position_of(symbol, [n for n in graph.nodes if n.op == "placeholder"]))


def devices_of(graph: fx.Graph) -> set[torch.device]:
    """The devices of all tensors in a graph."""
    return {tensor.device for node in graph.nodes for tensor in nodes.tensors_of(node)}


def home_device(devices: set[torch.device]) -> torch.device:
    """Where the region's work happens: its accelerator, or the CPU."""
    accelerators = sorted((d for d in devices if d.type not in ("cpu", "meta")), key=str)
    return accelerators[0] if accelerators else torch.device("cpu")


def capture_device(devices: set[torch.device], config: Config) -> tuple[GraphDevice | None, str]:
    """The device that captures, or ``None`` and the reason why nothing is captured."""
    if config.cudagraph_mode is CUDAGraphMode.NONE:
        return None, f"cudagraph_mode=NONE ({config.origin('cudagraph_mode')})"
    return device_for(devices, config.simulate, private=config.pool == "private")


def capturing(program: Program, device: GraphDevice | None, region: Region) -> Callable[..., Any]:
    """Put the graph runtime around a program; without a device the program itself runs."""
    if device is None:
        return program.run
    region.device = device.name
    return graph_runner(program, device, region.config, region.attach)
