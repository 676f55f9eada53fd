"""What a compile leaves behind for people: artifacts for tlparse always, a folder where ``debug_dir`` asks for one.

A dump that fails (no disk space, no permission, a graph that cannot be printed) is one warning and a note in the
report. It never stops a compile.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from torch import fx

from graphcap.compiler import private
from graphcap.compiler.debug import readable
from graphcap.compiler.debug.folder import RegionFolder
from graphcap.compiler.pieces import CompiledPiece
from graphcap.compiler.region import Region
from graphcap.compiler.split import Piece
from graphcap.cudagraph import PlanStats

log = logging.getLogger(__name__)


def open_dump(region: Region) -> Dump:
    """Start the dump of a region. Nothing is written without ``config.debug_dir``."""
    return Dump(region)


class Dump:
    """Told about each step of a compile as it is done.

    tlparse's artifacts are made only while torch traces (``TORCH_TRACE``); the folder only with ``debug_dir``.
    """

    def __init__(self, region: Region) -> None:
        self.region = region
        self.folder: RegionFolder | None = None
        self._failed = False
        if region.config.debug_dir is not None:
            self._attempt(self._open)

    def _open(self) -> None:
        assert self.region.config.debug_dir is not None
        self.folder = RegionFolder.create(self.region.config.debug_dir, self.region)
        self.region.on_plan = self._plan
        self.region.dump_dir = str(self.folder.path)
        log.info("%s: dump in %s", self.region.name, self.folder.path)

    def graph(self, name: str, gm: fx.GraphModule) -> None:
        """A whole graph, at the step that ``name`` says (``"before_split"``)."""
        self._trace(name, lambda: readable.graph_text(gm))
        self._in_folder(lambda folder: folder.graph(name, gm))

    def split(self, gm: fx.GraphModule, pieces: Sequence[Piece]) -> None:
        """The pieces, before they are compiled."""
        self._trace("after_split", lambda: readable.split_text(gm, pieces))
        self._in_folder(lambda folder: folder.split(gm, pieces))

    def close(self, pieces: Sequence[Piece], compiled: Sequence[CompiledPiece]) -> None:
        """The region is compiled and stitched; plans may follow when it runs."""
        for piece, result in zip(pieces, compiled, strict=True):
            if result.twin_of is None:
                self._trace(piece.name, lambda piece=piece: readable.graph_text(piece.module))  # type: ignore[misc]
        self._trace("stitched", lambda: self.region.source)
        self._in_folder(lambda folder: folder.close(pieces, compiled))

    def _plan(self, plan: PlanStats) -> None:
        self._in_folder(lambda folder: folder.plan(plan))

    def _trace(self, name: str, text: Callable[[], str]) -> None:
        self._attempt(lambda: private.trace_artifact(f"graphcap_{name}", text))

    def _in_folder(self, write: Callable[[RegionFolder], None]) -> None:
        if self.folder is not None:
            folder = self.folder
            self._attempt(lambda: write(folder))

    def _attempt(self, step: Callable[[], None]) -> None:
        """Do one step of the dump; after a failure no further one is tried."""
        if self._failed:
            return
        try:
            step()
        except Exception as error:
            self._failed = True
            note = f"the dump is incomplete: {type(error).__name__}: {error}"
            self.region.notes.append(note)
            log.warning("%s: %s", self.region.name, note)
