"""The configuration: one frozen dataclass, whether it comes from code, from torch's ``mode=`` or the environment.

:mod:`graphcap.precedence` says which of them wins, :mod:`graphcap.values` what each kind of setting accepts.
"""

from __future__ import annotations

import dataclasses
import enum
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, get_type_hints

from graphcap import values
from graphcap.errors import ConfigError
from graphcap.precedence import settle, unknown_setting
from graphcap.values import BadValue, Kind

#: A user's own split rule: takes a ``torch.fx.Node`` of the Dynamo graph, returns whether the graph is cut there.
SplittingRule = Callable[[Any], bool]


class CompilationMode(enum.Enum):
    """How much of the pipeline runs."""

    NONE = "none"  #: plain eager
    STOCK_TORCH_COMPILE = "stock_torch_compile"  #: ``torch.compile`` with Inductor, nothing of ours
    DYNAMO_TRACE_ONCE = "dynamo_trace_once"  #: the whole graph through Inductor; a second trace is a RecompileError
    PIECEWISE = "piecewise"  #: split, compile and capture the pieces, stitch: our pipeline


class CUDAGraphMode(enum.Enum):
    """What becomes part of a CUDA graph.

    A mode may treat two kinds of batches apart: uniform decode (all requests bring the same number of tokens) and mixed
    (prefill among them). :meth:`decode_mode` and :meth:`mixed_mode` say what each kind gets. The words are vLLM's
    but for AUTO.
    """

    NONE = "none"  #: nothing
    PIECEWISE = "piecewise"  #: the compiled pieces; attention and every other split op runs live
    FULL = "full"  #: the split ops too, but for those that must run live
    FULL_DECODE_ONLY = "full_decode_only"  #: FULL for uniform decode batches; mixed ones run compiled, without graphs
    FULL_AND_PIECEWISE = "full_and_piecewise"  #: FULL for uniform decode batches, PIECEWISE for mixed ones
    AUTO = "auto"  #: FULL where nothing in the region must run live, FULL_AND_PIECEWISE otherwise

    def decode_mode(self) -> CUDAGraphMode:
        """The mode of a uniform decode batch: NONE, PIECEWISE, FULL or AUTO."""
        decode_full = (CUDAGraphMode.FULL_DECODE_ONLY, CUDAGraphMode.FULL_AND_PIECEWISE)
        return CUDAGraphMode.FULL if self in decode_full else self

    def mixed_mode(self) -> CUDAGraphMode:
        """The mode of a mixed batch: NONE, PIECEWISE, FULL or AUTO."""
        if self is CUDAGraphMode.FULL_DECODE_ONLY:
            return CUDAGraphMode.NONE
        return CUDAGraphMode.PIECEWISE if self is CUDAGraphMode.FULL_AND_PIECEWISE else self

    def separate_routine(self) -> bool:
        """Whether uniform decode batches are treated in another way than mixed ones."""
        return self in (CUDAGraphMode.FULL_DECODE_ONLY, CUDAGraphMode.FULL_AND_PIECEWISE)


class Setting(NamedTuple):
    """One row of :meth:`Config.describe`."""

    name: str
    value: Any
    origin: str


@dataclass(frozen=True, kw_only=True)
class Config:
    """Every setting of graphcap. Instances are immutable; two of equal values are equal, wherever the values came from.

    Raises:
        ConfigError: an unknown name, a wrong type, a value out of range.
    """

    compilation_mode: CompilationMode = CompilationMode.PIECEWISE
    """How much of the pipeline runs. NONE is plain eager."""

    enforce_eager: bool = False
    """Run the model as it is: no compilation, no graphs, whatever the other settings say."""

    cudagraph_mode: CUDAGraphMode = CUDAGraphMode.AUTO
    """What becomes part of a CUDA graph."""

    compiler: str = "inductor"
    """What compiles a piece: "inductor", or "eager" to run it without Inductor (same bits as eager)."""

    splitting_ops: tuple[str, ...] | None = None
    """Where the graph is cut: "ns::op", "ns::op.overload", "ns::*" or "package.module.function". None is the built-in
    list (attention in its known spellings); a tuple replaces that list."""

    splitting_rules: tuple[SplittingRule, ...] = ()
    """Functions of a torch.fx.Node; where one returns True the graph is cut as well."""

    compile_sizes: tuple[int, ...] = ()
    """Sizes of the only dynamic dim for which pieces are also compiled with static shapes."""

    dynamic_arg_dims: Mapping[str, Any] | None = field(default=None, hash=False)
    """Which dims of which arguments change between calls, by name: {"input_ids": {0: "num_tokens"}}. Dims declared here
    (or as the argument of that name of graphcap.compile and @support_graph_compile) may be padded. None is none."""

    pad: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """What fills the padded rows of an argument: a number, "edge" (repeat the last row) or a function of the padded
    tensor and its real size that fills the rest in place. Declared dims of arguments not named here are filled with 0,
    except that a write index must be named. Padding happens only where every input that carries a size declares it."""

    capture_sizes: tuple[int, ...] | Mapping[str, tuple[int, ...]] | None = field(default=None, hash=False)
    """The ladder: sizes that are captured at their second sight (the first call is the warm-up). A list is for
    "num_tokens" or the only dynamic dim, a mapping has one list for each named dim. None is 1, 2, 4, 8..256 by 8,
    272..512 by 16 where sizes may be padded, and no declared size elsewhere. Alias: cudagraph_capture_sizes."""

    max_capture_size: int | None = None
    """Larger sizes are never captured. None is the largest declared one. Alias: max_cudagraph_capture_size."""

    max_num_reqs: int | None = None
    """The most requests in a batch: caps the ladder of uniform decode batches. None is no limit."""

    max_padding_ratio: float = 0.5
    """The largest part of a padded batch that may be padding: (rung - n) / rung. Beyond it a size is not declared."""

    capture_after: int = 3
    """A shape outside `capture_sizes` is captured at this sighting; at least 2, as an earlier call is the warm-up."""

    num_warmups: int | None = None
    """Live calls of each rung before graphcap.capture() records it. None is two of the first rung of each kind of
    batch, and of each further one none where its graphs hold compiled code only, one where they hold attention or an
    op that was declared. With 0 a rung is recorded at once where another one of its kind has been. When a recording
    without warm-up fails, this rung and all later ones get one. In a process group None is 2, and 0 has no effect."""

    max_plans: int = 64
    """How many shapes of one region may be captured besides those of the ladder; later ones run compiled. Each value of
    a tag in specialize_tags has a ladder of its own, which is not counted here: only max_graph_bytes bounds those."""

    max_graph_bytes: int | None = None
    """Bytes of device memory that graphs, their pool and static buffers may take on a device; beyond it the plan that
    was used longest ago goes. None is a tenth of the device's memory."""

    specialize_tags: tuple[str, ...] = ()
    """Names of tags of graphcap.step() that have plans of their own for each value."""

    pool: str = "shared"
    """"shared": one memory pool and one recording stream for each device. "private": this model has its own, so that it
    may run at the same time as others, at the price of memory."""

    process_group: Any = field(default=None, hash=False)
    """The torch.distributed.ProcessGroup of the ranks that run this model together. They then decide together what is
    captured, padded and given up, so that all run the same collectives; every rank makes the same calls in the same
    order. None is one process that decides alone. Not kept by pickle."""

    guards: str = "full"
    """What graphcap.compile and the decorator check on every call besides tensors and arguments. "full": Dynamo's
    guards. "sealed": `training` and the identity of every module and parameter; the guards when a plan is made and at
    every 256th call, where a failure is a GuardError."""

    fallback: str = "eager"
    """What runs a target that Dynamo cannot trace. "eager": the original. "breakable": captured without Dynamo."""

    verify: bool | int = False
    """Compare replays with live runs, piece by piece: every one (True), or the first N of each plan. Slow."""

    annotate: bool = False
    """Put the names of pieces into torch.profiler and NVTX ranges."""

    outputs: str = "clone"
    """What a replay returns. "clone": fresh tensors, safe to keep. "static": the graph's own memory, valid until the
    next replay of the same captured shape. "ring:N": copies in N alternating buffers, overwritten by the N-th later
    replay of that shape. The call that captures counts as one; a call without a graph always returns fresh tensors."""

    static_args: tuple[str, ...] = ()
    """Names of arguments that keep their address between calls: read and written in place, never copied."""

    max_copy_bytes: int = 16 * 2**20
    """Bytes. A larger input of a graph is never copied: it is used in place and its address checked on every call."""

    disable_passes: tuple[str, ...] = ()
    """Names of graph passes that do not run."""

    require_passes: tuple[str, ...] = ()
    """Names of graph passes that must match in every region; a region without a match is a PassRequiredError."""

    inductor_compile_config: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Settings of torch._inductor.config that hold while a piece is compiled."""

    cache: bool = True
    """Keep compiled pieces on disk and load them from there."""

    cache_dir: str | None = None
    """Where compiled pieces are kept. None is $XDG_CACHE_HOME/graphcap or ~/.cache/graphcap."""

    debug_dir: str | None = None
    """Write graphs, pieces, generated code and a timeline into this folder. None writes nothing."""

    simulate: bool = False
    """Without a GPU, run captures and replays on the simulated device: a test of the logic, never a gain in speed."""

    progress: bool = False
    """Show progress bars while compiling and capturing."""

    def __new__(cls, **given: Any) -> Config:
        for name in given:
            if name not in KINDS:
                raise unknown_setting(name, KINDS)
        self = super().__new__(cls)
        object.__setattr__(self, "_origins", dict.fromkeys(given, "code"))
        return self

    def __post_init__(self) -> None:
        for name, kind in KINDS.items():
            try:
                object.__setattr__(self, name, kind.accept(getattr(self, name)))
            except BadValue as bad:
                raise ConfigError(f"{name}: {bad}") from None
        both = sorted(set(self.disable_passes) & set(self.require_passes))
        if both:
            raise ConfigError(f"require_passes and disable_passes both name {', '.join(both)}")
        if self.require_passes and self.compiler == "eager":
            raise ConfigError(
                f"require_passes ({', '.join(self.require_passes)}) and compiler='eager' contradict each other: passes "
                "run inside Inductor. Drop one of them"
            )
        if self.require_passes and self.compilation_mode is CompilationMode.STOCK_TORCH_COMPILE:
            raise ConfigError(
                f"require_passes ({', '.join(self.require_passes)}) cannot be met with "
                "compilation_mode=STOCK_TORCH_COMPILE, in which no pass runs. Drop one of them"
            )

    @classmethod
    def resolve(
        cls,
        options: Mapping[str, Any] | Config | None = None,
        mode: str | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> Config:
        """Build the configuration of one ``torch.compile`` call, by the precedence of :mod:`graphcap.precedence`.

        Args:
            options: settings given in code, by name or alias; a Config stands for its :meth:`to_dict`.
            mode: torch's ``mode=``; see :data:`graphcap.precedence.MODES`.
            environ: the environment; ``os.environ`` when not given.

        Raises:
            ConfigError: as for the class, and for a bad environment variable or an unknown mode.
        """
        given = options.to_dict() if isinstance(options, Config) else options
        chosen, origins = settle(given or {}, mode, os.environ if environ is None else environ, KINDS)
        config = cls(**chosen)
        object.__setattr__(config, "_origins", origins)
        return config

    def origin(self, name: str) -> str:
        """Where a setting's value came from: ``"default"``, ``"code"``, ``"mode"`` or ``"env GRAPHCAP_X"``."""
        if name not in KINDS:
            raise unknown_setting(name, KINDS)
        return self._given().get(name, "default")

    def to_dict(self) -> dict[str, Any]:
        """The settings that are not left at their default, as ``options=`` takes them: enum members by name.

        What was left out stays open to the environment, as if this Config had been written out in code.
        """
        return {name: _plain(getattr(self, name)) for name in KINDS if name in self._given()}

    def describe(self) -> list[Setting]:
        """Every setting with its value and origin, in the order of the fields."""
        return [Setting(name, getattr(self, name), self.origin(name)) for name in KINDS]

    def _given(self) -> Mapping[str, str]:
        return self._origins  # type: ignore[attr-defined,no-any-return]

    def __reduce__(self) -> tuple[Any, ...]:
        settings = {name: _plain(getattr(self, name)) for name in KINDS if name != "process_group"}  # of this process
        origins = {name: origin for name, origin in self._given().items() if name in settings}
        return _rebuild, (settings, origins)

    def __deepcopy__(self, memo: Any) -> Config:
        return self  # nothing in it ever changes


def _plain(value: Any) -> Any:
    """The value as options= takes it and pickle keeps it: no enum member, no mapping proxy."""
    if isinstance(value, enum.Enum):
        return value.name
    return dict(value) if isinstance(value, Mapping) else value


def _rebuild(settings: dict[str, Any], origins: dict[str, str]) -> Config:
    config = Config(**settings)
    object.__setattr__(config, "_origins", origins)
    return config


#: What a setting's annotation alone does not say.
_KIND_OF_NAME: dict[str, Kind] = {
    "splitting_ops": values.optional(values.OPERATORS),
    "compiler": values.one_of("inductor", "eager"),
    "outputs": values.OUTPUTS,
    "process_group": values.optional(values.PROCESS_GROUP),
    "pool": values.one_of("shared", "private"),
    "guards": values.one_of("full", "sealed"),
    "fallback": values.one_of("eager", "breakable"),
    "dynamic_arg_dims": values.optional(values.MAPPING),
    "pad": values.FILLS,
    "capture_sizes": values.optional(values.LADDERS),
    "max_num_reqs": values.optional(values.at_least(1)),
    "max_padding_ratio": values.RATIO,
    "num_warmups": values.optional(values.at_least(0)),
    "max_graph_bytes": values.optional(values.at_least(0)),
    "verify": values.COUNT_OR_BOOL,
    "max_capture_size": values.optional(values.at_least(1)),
    "capture_after": values.at_least(2),
    "max_plans": values.at_least(1),
    "max_copy_bytes": values.at_least(0),
}

_KIND_OF_TYPE: dict[Any, Kind] = {
    bool: values.BOOL,
    str | None: values.optional(values.STR),
    tuple[int, ...]: values.SIZES,
    tuple[int, ...] | None: values.optional(values.SIZES),
    tuple[str, ...]: values.NAMES,
    tuple[SplittingRule, ...]: values.FUNCTIONS,
    Mapping[str, Any]: values.MAPPING,
    CompilationMode: values.member_of(CompilationMode),
    CUDAGraphMode: values.member_of(CUDAGraphMode),
}


def _kinds() -> dict[str, Kind]:
    types = get_type_hints(Config)
    return {
        each.name: _KIND_OF_NAME.get(each.name) or _KIND_OF_TYPE[types[each.name]]
        for each in dataclasses.fields(Config)
    }


#: Every setting and how it is read.
KINDS: dict[str, Kind] = _kinds()
