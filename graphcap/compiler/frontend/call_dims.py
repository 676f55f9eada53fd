"""Dynamic dims applied to calls: find the tensors, check their sizes, list what a trace has to mark.

A name is a promise: within one call, all dims of one name have the same size.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from graphcap.compiler.frontend.dims import DEFAULT_NAME, DynamicDim, infer, parse, unparse
from graphcap.compiler.frontend.paths import fetch, is_container, is_of_step, leaves, place_of, step_value
from graphcap.cudagraph.dispatch.metadata import PREFIX
from graphcap.cudagraph.dispatch.step import current
from graphcap.errors import DimError


class TensorDims(NamedTuple):
    """The dynamic dims of one tensor of one call: ``{dim: name}``, all dims non-negative."""

    tensor: torch.Tensor
    names: dict[int, str]


class CallDims:
    """Dynamic dims bound to one function's signature.

    Attributes:
        dims: what was declared or inferred, of the arguments.
        step_dims: what was declared of the inputs of a step, ``"step.seq_lens"``. They are no arguments of the call,
            but those that traced code reads are checked as if they were, once :meth:`read_of_step` has named them.
        inferred: whether it was inferred. A declaration that does not fit a call is an error, an inference is not:
            what does not fit it is left alone.
    """

    def __init__(self, dims: Sequence[DynamicDim], signature: inspect.Signature, owner: str, *, inferred: bool) -> None:
        """Look up every argument.

        Args:
            dims: the dims.
            signature: of the call, without ``self``.
            owner: whose signature it is, for messages.
            inferred: see the class.

        Raises:
            DimError: there is no parameter of that name.
        """
        self.dims = tuple(dim for dim in dims if not is_of_step(dim.path, signature))
        self.step_dims = tuple(dim for dim in dims if is_of_step(dim.path, signature))
        self.inferred = inferred
        self._signature = signature
        self._owner = owner
        self._places = tuple(place_of(dim, signature, owner) for dim in self.dims)
        direct = [p for p in self._places if not p.steps and not p.rest]
        self._direct = tuple((p.position, p.keyword, p.dim.dim, *_base(p.dim)) for p in direct)
        self._all_direct = len(direct) == len(self._places)
        self._read: tuple[DynamicDim, ...] = ()
        self._read_direct: tuple[tuple[str, int, str, int, int], ...] = ()

    @classmethod
    def of(cls, fn: Callable[..., Any], declared: Mapping[str, Any] | None) -> CallDims:
        """The dims of a function or bound method: as declared, or inferred where ``declared`` is ``None``.

        Raises:
            DimError: ``declared`` is malformed or names an argument that ``fn`` does not have.
        """
        dims = infer(fn) if declared is None else parse(declared)
        owner = getattr(fn, "__qualname__", type(fn).__name__)
        return cls(dims, inspect.signature(fn), owner, inferred=declared is None)

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self.dims or self.step_dims)

    def read_of_step(self, paths: Iterable[str]) -> None:
        """From now on calls also check the declared dims of these inputs of the step (``"step.seq_lens"``)."""
        roots = {dim.path: ".".join(dim.path.split(".")[:2]) for dim in self.step_dims}
        wanted = {*paths, *(roots[dim.path] for dim in self._read)}
        read = tuple(dim for dim in self.step_dims if roots[dim.path] in wanted)
        direct = [dim for dim in read if dim.path == roots[dim.path]]
        self._read_direct = tuple((dim.path.removeprefix(PREFIX), dim.dim, *_base(dim)) for dim in direct)
        self._all_direct = self._all_direct and len(direct) == len(read)
        self._read = read

    def declared(self) -> dict[str, Any]:
        """The dims for ``Config.dynamic_arg_dims``: those that the user declared, as ``parse`` reads them."""
        return {} if self.inferred else unparse((*self.dims, *self.step_dims))

    def require(self, paths: Iterable[str], setting: str) -> None:
        """Check that these are paths of arguments.

        Raises:
            DimError: there is no parameter of that name.
        """
        for path in paths:
            if not is_of_step(path, self._signature):
                place_of(DynamicDim(path, 0, DEFAULT_NAME), self._signature, self._owner, setting)

    def independent(self) -> CallDims:
        """The same dims, each under a name of its own."""
        renamed = [d._replace(name=f"{d.path}.{d.dim}") for d in self.dims]
        return CallDims([*renamed, *self.step_dims], self._signature, self._owner, inferred=self.inferred)

    def check(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Check that this call has the declared dims and that names agree.

        Runs on every call, hence the short way for plain tensor arguments: about 0.25 us per dim.

        Raises:
            DimError: a tensor has too few dims, or one name stands for two sizes.
        """
        sizes: dict[str, float] = {}
        num_args = len(args)
        try:
            if self._all_direct:
                for position, keyword, dim, name, scale, offset in self._direct:
                    value = args[position] if position < num_args else kwargs.get(keyword)
                    if value is not None:
                        size = (value.shape[dim] - offset) / scale
                        if sizes.setdefault(name, size) != size:
                            break
                else:
                    if not self._read or self._agrees_with_step(sizes):
                        return
        except (IndexError, AttributeError, TypeError):
            pass  # a container or a misfit: the thorough way below tells them apart
        self._check_thoroughly(args, kwargs)

    def tensors(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[TensorDims]:
        """The tensors of this call with their dynamic dims, those of the step included.

        Raises:
            DimError: as for :meth:`check`, except for sizes, which are not compared.
        """
        found: dict[int, TensorDims] = {}
        for _, tensor, dim, declared in (*self.resolved(args, kwargs), *self._marked_of_step()):
            found.setdefault(id(tensor), TensorDims(tensor, {})).names[dim] = declared.name
        return list(found.values())

    def _agrees_with_step(self, sizes: dict[str, float]) -> bool:
        """Whether the inputs of the step have the sizes of the arguments. That one is missing the guards will see."""
        said = current()
        given = {} if said is None else said.inputs.given
        for key, dim, name, scale, offset in self._read_direct:
            value = given.get(key)
            if value is not None:
                size = (value.shape[dim] - offset) / scale
                if sizes.setdefault(name, size) != size:
                    return False
        return True

    def _check_thoroughly(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen: dict[str, list[tuple[str, torch.Tensor, int, DynamicDim, float]]] = {}
        for path, tensor, dim, declared in (*self.resolved(args, kwargs), *self._of_step(self._read)):
            name, scale, offset = _base(declared)
            base = (tensor.shape[dim] - offset) / scale
            seen.setdefault(name, []).append((path, tensor, dim, declared, base))
        for name, places in seen.items():
            if len({base for *_, base in places}) > 1:
                listed = ", ".join(
                    f"{path}.shape[{dim}] = {tensor.shape[dim]}" + (f" ({each.name})" if each.follows else "")
                    for path, tensor, dim, each, _ in places
                )
                path, _, dim, _, _ = places[-1]
                raise DimError(
                    f"dim {name!r} has different sizes in one call: {listed}. Dims of one name must agree; "
                    f"where they are independent give them different names: {{{path!r}: {{{dim}: 'other'}}}}"
                )

    def resolved(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Iterator[tuple[str, torch.Tensor, int, DynamicDim]]:
        """Every declared dim that this call has: path, tensor, non-negative dim, what was declared.

        Raises:
            DimError: a tensor has too few dims, or is none.
        """
        for place in self._places:
            value = fetch(place, args, kwargs)
            if not isinstance(value, (torch.Tensor, type(None))) and not is_container(value) and not self.inferred:
                raise DimError(f"{place.dim.path}: expected a tensor, got {type(value).__name__} ({value!r})")
            yield from self._in_value(place.dim, value)

    def _of_step(self, dims: Iterable[DynamicDim]) -> Iterator[tuple[str, torch.Tensor, int, DynamicDim]]:
        """The same of inputs of the step in force. What is no tensor there is no misfit: the trace sees what it is."""
        for declared in dims:
            yield from self._in_value(declared, step_value(declared.path))

    def _marked_of_step(self) -> Iterator[tuple[str, torch.Tensor, int, DynamicDim]]:
        """Those that a trace may read. A misfit is none before it does."""
        for declared in self.step_dims:
            for path, tensor in leaves(declared.path, step_value(declared.path)):
                if -tensor.dim() <= declared.dim < tensor.dim():
                    yield path, tensor, declared.dim % tensor.dim(), declared

    def _in_value(self, declared: DynamicDim, value: Any) -> Iterator[tuple[str, torch.Tensor, int, DynamicDim]]:
        for path, tensor in leaves(declared.path, value):
            rank = tensor.dim()
            if -rank <= declared.dim < rank:
                yield path, tensor, declared.dim % rank, declared
            elif not self.inferred:
                raise DimError(
                    f"{path}: dim {declared.dim} is declared dynamic, but the tensor has {rank} dims "
                    f"{tuple(tensor.shape)}"
                )


def _base(dim: DynamicDim) -> tuple[str, int, int]:
    """The name that a dim's size follows, the factor, and what is added."""
    return dim.follows or (dim.name, 1, 0)
