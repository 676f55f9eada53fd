"""Inductor: compiling a piece, its artifact, the code that it generated, the settings that reach it."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import fx

from graphcap.compiler.private.fusion_scores import hinted_scores
from graphcap.compiler.private.views import inlined_views


def inductor_with_autograd(gm: fx.GraphModule, example_inputs: Sequence[Any], patches: dict[str, Any]) -> Any:
    """Compile as ``backend="inductor"`` does, joint graph and backward included."""
    from torch._inductor.compile_fx import compile_fx

    return compile_fx(gm, list(example_inputs), config_patches=patches)


def standalone_compile(gm: fx.GraphModule, inputs: Sequence[Any], *, fake_mode: Any, patches: dict[str, Any]) -> Any:
    """One piece through Inductor.

    Args:
        gm: the piece.
        inputs: fake tensors and SymInts of ``fake_mode``; with ``fake_mode=None`` real tensors and ints, whose sizes
            the
            result is specialised to.
        fake_mode: the mode whose symbols the result keeps.
        patches: Inductor settings.
    """
    from torch._guards import TracingContext, tracing
    from torch._inductor import standalone_compile as compile_piece

    shapes: Any = "from_tracing_context" if fake_mode is not None else "from_example_inputs"
    context = tracing(TracingContext(fake_mode)) if fake_mode is not None else contextlib.nullcontext()
    with context, inlined_views(), hinted_scores():
        return compile_piece(gm, list(inputs), dynamic_shapes=shapes, options={"config_patches": patches})


def artifact_bytes(artifact: Any) -> bytes | None:
    """The bytes of a compiled artifact, ``None`` when Inductor says that it cannot be saved."""
    if not getattr(artifact, "is_saveable", lambda: False)():
        return None
    with tempfile.TemporaryDirectory(prefix="graphcap-") as folder:
        path = Path(folder) / "artifact"
        artifact.save(path=str(path), format="binary")
        return path.read_bytes()


def load_artifact(payload: bytes) -> Callable[..., Any]:
    """The callable of :func:`artifact_bytes`' payload. Unpickles: give it only bytes that the store trusts."""
    from torch._inductor.standalone_compile import CompiledArtifact

    with tempfile.TemporaryDirectory(prefix="graphcap-") as folder:
        path = Path(folder) / "artifact"
        path.write_bytes(payload)
        loaded: Callable[..., Any] = CompiledArtifact.load(path=str(path), format="binary")
        return loaded


@contextlib.contextmanager
def inductor_scratch(folder: Path | None) -> Iterator[None]:
    """Let Inductor and Triton write their kernels below ``folder`` while this block runs.

    ``None``, or a directory that the user chose in the environment, changes nothing. Inductor itself writes its default
    into the environment on first use, which is nobody's choice.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    names = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
    before = {name: os.environ.get(name) for name in names}
    chosen = before[names[0]] not in (None, default_cache_dir())
    if folder is None or chosen:
        yield
        return
    os.environ[names[0]] = str(folder)
    if (before[names[1]] or "").startswith(default_cache_dir()):
        del os.environ[names[1]]
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


class OutputCode:
    """Collects the Python that Inductor generated or loaded inside a ``with`` block (``PyCodeCache.modules``)."""

    def __enter__(self) -> OutputCode:
        self._before = len(self._modules())
        return self

    def __exit__(self, *exc: object) -> None:
        texts = []
        for module in self._modules()[self._before :]:
            with contextlib.suppress(OSError, TypeError):
                texts.append(Path(module.__file__).read_text())
        self.text = "\n".join(texts)

    @staticmethod
    def _modules() -> list[Any]:
        try:
            from torch._inductor.codecache import PyCodeCache

            return list(PyCodeCache.modules)
        except (ImportError, AttributeError):
            return []


def inductor_setting_types() -> dict[str, Any]:
    """Every setting of ``torch._inductor.config`` with its type; ``object`` where torch does not tell it."""
    from torch._inductor import config

    inductor: Any = config
    # A setting without annotation whose default is None is said to be of type None: that tells nothing.
    types = {name: inductor.get_type(name) for name in inductor.get_config_copy()}
    return {name: object if kind in (type(None), Any) else kind for name, kind in types.items()}


def codegen_config() -> dict[str, str]:
    """The Inductor and functorch settings that reach generated code, by torch's own list of what does not."""
    import torch._functorch.config as functorch
    import torch._inductor.config as inductor

    portable = {}
    for name, module in (("inductor", inductor), ("functorch", functorch)):
        for key, value in module.save_config_portable().items():
            if not callable(value):
                portable[f"{name}.{key}"] = repr(value)
    return portable
