"""Everything this room takes from torch that torch does not promise to keep. Checked on 2.11 and 2.13.

A torch upgrade is a walk through this folder. Each function says what it relies on and what it returns when that is
gone: what only informs (frames, guard failures, generated code) degrades to "unknown", what compiles raises.

By theme: :mod:`~graphcap.compiler.private.dynamo` (what Dynamo tells, and its hooks),
:mod:`~graphcap.compiler.private.tensors`, :mod:`~graphcap.compiler.private.shapes` (symbols and guards),
:mod:`~graphcap.compiler.private.operators`, :mod:`~graphcap.compiler.private.inductor`,
:mod:`~graphcap.compiler.private.slices`, :mod:`~graphcap.compiler.private.views` and
:mod:`~graphcap.compiler.private.fusion_scores` (what it makes of sizes without an example),
:mod:`~graphcap.compiler.private.attention` (its masks),
:mod:`~graphcap.compiler.private.trees` (nested containers).
"""

from graphcap.compiler.private.attention import forbidden_score
from graphcap.compiler.private.dynamo import (
    Frame,
    current_frame,
    is_frame_of,
    latest_guard_failure,
    on_bytecode,
    original_of,
    recompile_limit,
    restarts_trace,
    source_name,
    trace_artifact,
)
from graphcap.compiler.private.inductor import (
    OutputCode,
    artifact_bytes,
    codegen_config,
    inductor_scratch,
    inductor_setting_types,
    inductor_with_autograd,
    load_artifact,
    standalone_compile,
)
from graphcap.compiler.private.operators import (
    argument_names,
    call_is_watched,
    custom_op_kernel,
    operator_names,
    operators_are_watched,
    out_overload,
    resolve_op_overload,
    returns_tensors_and_sizes,
    schemas_of,
    triton_kernel_name,
)
from graphcap.compiler.private.shapes import (
    add_shape_guard,
    bound_symbol,
    is_unbacked,
    shape_guards,
    size_hint,
    symbol_expression,
    symbol_ranges,
    without_replaced_symbols,
)
from graphcap.compiler.private.slices import exact_slices
from graphcap.compiler.private.tensors import (
    as_dynamo_traces,
    default_device,
    fake_mode_of,
    is_plain_tensor,
    is_real,
    is_static_input,
    is_wrapper_subclass,
    marked_dims,
    real_tensors_allowed,
    storage_id,
    weak_storage,
)
from graphcap.compiler.private.trees import (
    tree_flatten,
    tree_leaf_names,
    tree_unflatten,
)

__all__ = [
    "Frame",
    "OutputCode",
    "add_shape_guard",
    "argument_names",
    "artifact_bytes",
    "as_dynamo_traces",
    "bound_symbol",
    "call_is_watched",
    "codegen_config",
    "current_frame",
    "custom_op_kernel",
    "default_device",
    "exact_slices",
    "fake_mode_of",
    "forbidden_score",
    "inductor_scratch",
    "inductor_setting_types",
    "inductor_with_autograd",
    "is_frame_of",
    "is_plain_tensor",
    "is_real",
    "is_static_input",
    "is_unbacked",
    "is_wrapper_subclass",
    "latest_guard_failure",
    "load_artifact",
    "marked_dims",
    "on_bytecode",
    "operator_names",
    "operators_are_watched",
    "out_overload",
    "original_of",
    "real_tensors_allowed",
    "recompile_limit",
    "resolve_op_overload",
    "restarts_trace",
    "returns_tensors_and_sizes",
    "schemas_of",
    "shape_guards",
    "size_hint",
    "source_name",
    "standalone_compile",
    "storage_id",
    "symbol_expression",
    "symbol_ranges",
    "trace_artifact",
    "tree_flatten",
    "tree_leaf_names",
    "tree_unflatten",
    "triton_kernel_name",
    "weak_storage",
    "without_replaced_symbols",
]
