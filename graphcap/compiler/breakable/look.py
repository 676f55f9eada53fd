"""One look at a call: the function itself runs, nothing of it compiled, and is watched from all sides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from graphcap.compiler import private
from graphcap.compiler.breakable.calls import Kind
from graphcap.compiler.breakable.incoming import Incoming
from graphcap.compiler.breakable.inside import asked_apart
from graphcap.compiler.breakable.key import Arguments
from graphcap.compiler.breakable.origin import module_names
from graphcap.compiler.breakable.outside import facts, shown_name
from graphcap.compiler.breakable.record import Recorder, record
from graphcap.compiler.breakable.result import Result
from graphcap.compiler.breakable.state import Found, changed, is_tensor, snapshot, walk
from graphcap.compiler.frontend.disabling import is_disabled
from graphcap.cudagraph.dispatch.phase import current_purpose


@dataclass(slots=True)
class Look:
    """What was seen.

    Attributes:
        recording: of the operators.
        result: of the function.
        made: the same, taken apart.
        asked: the step inputs that the function looked for outside of live functions.
        refusal: why such calls can never be repeated, ``""`` where they may.
        unsettled: why this one cannot, though a later one may.
    """

    recording: Recorder
    result: Any
    made: Result
    asked: set[str]
    refusal: str = ""
    unsettled: str = ""

    def written(self) -> list[torch.Tensor]:
        """The tensors that it wrote and that were not made in it, as far as they are still there."""
        written = {storage for call in self.recording.calls for storage in call.written}
        values = [v for v in self.recording.values if v.storage in written and v.kind is not Kind.RESULT]
        return [tensor for value in values if (tensor := value.tensor()) is not None]


@dataclass(frozen=True, slots=True)
class Viewpoint:
    """Where an entry looks from.

    Attributes:
        roots: gives what the function's Python state is reached from.
        num_own_roots: how many of them belong to the target; the others are arguments.
        ask: told of inputs of the step that the function reads and that are not among its arguments yet.
    """

    roots: Callable[[], Sequence[Any]]
    num_own_roots: int
    ask: Callable[[set[str]], None]

    def facts(self) -> list[Found]:
        """What must stay as it is."""
        return facts(self.roots(), self.num_own_roots)

    def here(self, call: Incoming, may_write: Sequence[torch.Tensor]) -> Look | None:
        """Serve a call by the function itself and look at it; ``None`` where that shows that it needs another key.

        Args:
            call: of which nothing has run.
            may_write: the tensors that it may write, for those who put them back.
        """
        arguments = call.arguments
        if (keeper := current_purpose().keeper) is not None:
            given = {id(tensor) for tensor in arguments.tensors} - keeper.lent
            keeper.keep(each for each in may_write if id(each) not in given)
        look = self.look(call.run, arguments.tensors, arguments, call.names)
        call.result, call.has_run, look.result = look.result, True, None
        if look.asked - call.step_names:
            self.ask(look.asked)
            return None
        return look

    def reachable(self) -> list[torch.Tensor]:
        """The tensors that a call may write, as far as anybody can tell before one: all but parameters, small ones
        first."""
        tensors = (each.value for each in walk(self.roots()) if is_tensor(each.value))
        found = [each for each in tensors if not isinstance(each, nn.Parameter)]
        return sorted(found, key=lambda each: each.numel() * each.element_size())

    def look(
        self,
        function: Callable[[], Any],
        tensors: Sequence[torch.Tensor],
        arguments: Arguments,
        names: Callable[[], list[str]],
    ) -> Look:
        """Run a function once.

        Args:
            function: the call.
            tensors: its arguments.
            arguments: of the call as it came, where ``tensors`` may have been replaced.
            names: of the leaves of the arguments.
        """
        before = snapshot(self.roots())
        look = self.watch(function, tensors, arguments)
        effect = changed(before, snapshot(self.roots()))
        if effect is not None:
            name = shown_name(effect, arguments, names(), self.num_own_roots)
            look.unsettled = f"a call changes {name}, which a replay would not do"
        look.unsettled = look.unsettled or look.recording.numbering.outlived(private.tree_flatten(look.result)[0])
        return look

    def watch(
        self, function: Callable[[], Any], tensors: Sequence[torch.Tensor], arguments: Arguments, keep: bool = False
    ) -> Look:
        """The same, without a look at what the function changes; ``keep``: what live calls do."""
        own = [root for root in self.roots()[: self.num_own_roots] if isinstance(root, nn.Module)]
        naming = module_names.set({id(module): name for root in own for name, module in root.named_modules()})
        disabling = is_disabled.set(True)
        asked: set[str] = set()
        try:
            with torch.compiler.set_stance("force_eager"), asked_apart(asked):
                recording, result = record(function, tensors, keep)
        finally:
            is_disabled.reset(disabling)
            module_names.reset(naming)
        made = Result.of(result, arguments)
        return Look(recording, result, made, asked, recording.refusal or made.odd)
