"""One compiled target: a module, function or bound method, and what happens between its caller and Dynamo.

A call goes through :meth:`CompiledTarget.call`: check the declared dims, then run what ``torch.compile`` made. (A
sealed call that looks exactly like an earlier one needs no check.) Dims are marked only while Dynamo traces, from a
callback at the start of a trace, and unmarked when the call ends. So no call but a compiling one pays for marks, a
recompile for whatever reason still sees them, and no tensor of the caller keeps an attribute. With two declared dims a
call costs 2 us more than one through ``nn.Module.compile()``, 0.5 of it the checks (torch 2.13, one CPU core); setting
and clearing the marks on every call would alone cost 2.0.

What is asked of a trace, and what is asked next where it fails: :mod:`graphcap.compiler.frontend.attempts`.
"""

from __future__ import annotations

import functools
import logging
import os
import warnings
import weakref
from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from graphcap.compiler.frontend import dynamo
from graphcap.compiler.frontend.attempts import next_attempt
from graphcap.compiler.frontend.call_dims import CallDims
from graphcap.compiler.frontend.direct_call import DirectCalls
from graphcap.compiler.frontend.frame_function import MISS
from graphcap.compiler.frontend.hooks import HookWatch, modules_of
from graphcap.compiler.frontend.marked_call import DYNAMIC, UNBACKED, MarkedCall, in_progress, on_trace_start
from graphcap.compiler.frontend.step_source import inputs_read_of_step
from graphcap.config import CompilationMode, Config
from graphcap.environment import direct_call_wanted
from graphcap.errors import DimError

log = logging.getLogger("graphcap.compiler")


def backend() -> Callable[..., Any]:
    """The backend that targets compile with; imported at the first call, not with the package."""
    from graphcap.compiler.backend import graphcap

    return graphcap


class CompiledTarget:
    """What was asked for one module, function or method, and how it is going.

    Attributes:
        name: what the user would call it: ``"Decoder.forward"``.
        kind: ``"module"``, ``"function"`` or ``"method"``.
        options: settings as the user gave them.
        config: the settings in force.
        is_eager: whether the settings say that nothing is compiled.
        fullgraph: whether the user wants a graph break to be an error.
        dims: the dynamic dims.
        marking: ``"unbacked"`` (one graph for every size) or ``"dynamic"`` (sizes 0 and 1 have their own graphs).
        wants_whole_graph: whether a trace must be one graph: until one could not.
        notes: one line per decision that was not the user's.
        entry: the Python function that Dynamo sees; its code object belongs to this target alone.
        direct: the ways around Dynamo's frame hook, for calls whose graph its guards allow.
    """

    def __init__(
        self,
        original: Callable[..., Any],
        entry: FunctionType,
        *,
        name: str,
        kind: str,
        dims: CallDims,
        options: Mapping[str, Any],
        fullgraph: bool = False,
    ) -> None:
        self.name = name
        self.kind = kind
        self.options = {**options, "dynamic_arg_dims": dims.declared()} if dims else dict(options)
        self.config = Config.resolve(self.options)
        self.is_eager = self.config.enforce_eager or self.config.compilation_mode is CompilationMode.NONE
        self.fullgraph = fullgraph
        self.dims = dims
        self.marking = UNBACKED
        self.notes: list[str] = []
        self.entry = entry
        self.direct = DirectCalls(entry, sealed=self.config.guards == "sealed")
        self._takes_direct = direct_call_wanted(os.environ)
        self._reference = _reference(original)
        self._hooks = HookWatch(functools.partial(_modules, self._reference))
        self._guards_hooks = False
        self._request = (self.config, fullgraph, dims.dims)
        self._compiled: Callable[..., Any] | None = None
        self._instead: Callable[..., Any] | None = None
        self._trace_callbacks: list[Callable[..., None]] = []
        # Without dims a break is not for what the trace was told about them.
        self.wants_whole_graph = bool(dims) and not fullgraph

    @property
    def original(self) -> Any:
        """What the user handed in; ``None`` when that module is gone."""
        return self._reference()

    def same_request(self, other: CompiledTarget) -> bool:
        """Whether both ask for the same thing."""
        return type(self) is type(other) and self._request == other._request

    def call(self, bound: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the target compiled.

        Args:
            bound: the object that ``entry`` takes before ``args``, if any.
            args: the caller's positional arguments.
            kwargs: the caller's keyword arguments.

        Raises:
            DimError: the call does not have the declared dims.
            GuardError: ``guards="sealed"``, and something that the compiled code relies on has changed.
        """
        if RemovableHandle.next_id != self._hooks.counter and self._hooks.has_unguarded():
            self._trace_again_with_hooks()
        direct = self.direct
        if (result := direct.first_of(direct.again, bound, args, kwargs)) is not MISS:
            return result  # a call like this one has passed all checks
        self._check(args, kwargs)
        if (result := direct(bound, args, kwargs)) is not MISS:
            return result
        if self._instead is not None:
            return self._instead(bound, args, kwargs)
        if self._compiled is None:
            self._compile()
        if on_trace_start not in self._trace_callbacks:
            self._trace_callbacks.append(on_trace_start)
        outer, call = in_progress.call, MarkedCall(self, args, kwargs)
        in_progress.call = call
        try:
            result = self._run(bound, args, kwargs)
        except Exception as error:
            if not call.traced or dynamo.has_run(self.entry.__code__, error, call.has_graph):
                raise
            failure = error  # of the compilation: nothing of the target has run
        else:
            if call.traced:
                self._learn(bound)
            return result
        finally:
            in_progress.call = outer
            call.end()
        return self._retry(failure, bound, args, kwargs)

    def call_instead(self, other: Callable[..., Any]) -> None:
        """Have calls go to ``other(bound, args, kwargs)`` until :meth:`call_again`. Without it a call pays nothing."""
        vars(self)["call"] = other

    def call_again(self, other: Callable[..., Any]) -> bool:
        """End :meth:`call_instead`. Returns whether ``other`` was called until now: of several threads, one ends it."""
        return vars(self).pop("call", None) is other

    def unchecked_guards(self) -> list[str]:
        """The guards that are not evaluated on every call, as Dynamo words them; none with ``guards="full"``."""
        return self.direct.unchecked_guards()

    def _run(self, bound: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Through Dynamo, with what a trace has to know."""
        compiled = self._compiled
        assert compiled is not None
        if not self._guards_hooks:
            return compiled(*bound, *args, **kwargs)
        with dynamo.hook_guards():
            return compiled(*bound, *args, **kwargs)

    def _learn(self, bound: tuple[Any, ...]) -> None:
        self._hooks.traced()
        if not self._takes_direct:
            return
        for reason in self.direct.learn(bound):
            self._note(f"calls go through Dynamo: {reason}")

    def _check(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        try:
            self.dims.check(args, kwargs)
        except DimError as error:
            if not self.dims.inferred:
                raise
            # Nobody declared that these sizes agree, and they do not.
            self.dims = self.dims.independent()
            self._note(f"inferred dims are independent from now on: {error}")

    def _reads_of_step(self, paths: frozenset[str]) -> None:
        """A graph of this target takes these inputs of the step as it takes arguments."""
        self.dims.read_of_step(paths)
        if (call := in_progress.call) is not None and call.target is self:
            self.dims.check(call.args, call.kwargs)

    def _trace_again_with_hooks(self) -> None:
        dynamo.forget(self.entry.__code__)
        self._hooks = HookWatch(lambda: ())  # guards cover modules from now on, and never the hooks of all modules
        if not self._guards_hooks:
            self._guards_hooks = True
            self._note("a hook was registered after the trace: from now on guards see that modules have no hooks")

    def _compile(self) -> None:
        self._trace_callbacks = dynamo.trace_callbacks()
        graph_backend = backend()
        itself = weakref.ref(self)  # Dynamo keeps every backend for good

        @functools.wraps(graph_backend)
        def compile_graph(graph: Any, inputs: Any, **settings: Any) -> Any:
            target = itself()
            call = in_progress.call if in_progress.call is not None and in_progress.call.target is target else None
            if call is not None and call.demands:
                dynamo.graph_is_whole()
            if target is not None and (read := inputs_read_of_step(graph)):
                target._reads_of_step(read)
            compiled = graph_backend(graph, inputs, **settings)
            if call is not None:
                call.has_graph = True
            return compiled

        options = dict(self.options) or None
        self._compiled = torch.compile(self.entry, backend=compile_graph, fullgraph=self.fullgraph, options=options)

    def _retry(self, error: Exception, bound: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call again with less asked of the trace, and keep to that if it helps; else raise what the user can use."""
        if (own := dynamo.own_error(error)) is not None:
            raise own from None
        before = (self.wants_whole_graph, self.marking)
        following = next_attempt(self.wants_whole_graph, self.marking, error, has_dims=bool(self.dims))
        if following is None:
            return self._fall_back(error, bound, args, kwargs)
        self.wants_whole_graph, self.marking = following
        try:
            result = self.call(bound, args, kwargs)
        except Exception:
            self.wants_whole_graph, self.marking = before
            raise
        if self.is_eager or self._instead is not None:
            return result
        error.__traceback__ = None  # it holds the frame of the failed call, and with it the caller's tensors
        if before[1] == UNBACKED and self.marking == DYNAMIC:
            self._note(f"dims are marked {self.marking}, sizes 0 and 1 get graphs of their own: {_first_line(error)}")
        return result

    def _fall_back(
        self, error: Exception, bound: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Serve this call and all later ones in another way, as ``fallback`` says; nothing of the target has run."""
        breakable = self.config.fallback == "breakable"
        if not dynamo.cannot_compile(error) or (self.fullgraph and dynamo.is_graph_break(error) and not breakable):
            raise error
        if breakable:
            from graphcap.compiler.breakable.target import BreakableTarget

            other = BreakableTarget(
                self.original, self.entry, name=self.name, kind=self.kind, dims=self.dims, options=self.options
            )
            self._note(f"Dynamo cannot trace it, captured without (fallback='breakable'): {_first_line(error)}")
            if self.config.require_passes:
                self._note("require_passes was not checked: without Dynamo nothing goes through Inductor")
            self.notes = other.notes = [*self.notes]
            self._instead = other.call
            return other.call(bound, args, kwargs)
        result = self.entry(*bound, *args, **kwargs)
        why = f"Dynamo cannot trace {self.name}, which runs eager from now on: {_first_line(error)}"
        self._note(f"{why}. frontend='breakable' (or fallback='breakable') captures it without Dynamo")
        warnings.warn(f"graphcap: {self.notes[-1]}", stacklevel=2)
        self.is_eager = True
        return result

    def _note(self, note: str) -> None:
        self.notes.append(note)
        log.info("%s: %s", self.name, note)

    def __repr__(self) -> str:
        return f"CompiledTarget({self.name}, {self.kind}, marking={self.marking})"


def _reference(original: Callable[..., Any]) -> Callable[[], Any]:
    # A module holds its target, so the target must not hold the module: it would live until the next collection.
    if isinstance(original, torch.nn.Module):
        return weakref.ref(original)
    return lambda: original


def _modules(reference: Callable[[], Any]) -> list[torch.nn.Module]:
    return list(modules_of(reference()))


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    # BackendCompilerFailed says on its second line what happened.
    text = " ".join(lines[: 2 if lines and lines[0].endswith("raised:") else 1])
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
