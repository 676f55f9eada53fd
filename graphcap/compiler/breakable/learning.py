"""The first calls of an entry: the function itself serves them, until two looks at it agree."""

from __future__ import annotations

from graphcap.compiler.breakable.incoming import Incoming
from graphcap.compiler.breakable.look import Look, Viewpoint
from graphcap.compiler.breakable.padded_look import NoRoom, look_unseen
from graphcap.compiler.breakable.recordings import MAX_RECORDINGS, Recordings

_MAX_SIZES = 16  #: that calls may have before two of them agree
_SPARE_BYTES = 2**28  #: for a copy of what a call writes; there is no device to ask yet


class Learning:
    """Looks at the first calls.

    Attributes:
        refusal: why such calls can never be repeated, ``""`` where they may.
        unsettled: why the latest recording was thrown away, ``""`` where it was not.
    """

    def __init__(self, recordings: Recordings, viewpoint: Viewpoint) -> None:
        """Nothing was seen yet."""
        self.refusal = ""
        self.unsettled = ""
        self._recordings, self._viewpoint = recordings, viewpoint
        self._num_looks = 0
        self._latest: Look | None = None

    def serve(self, call: Incoming) -> Look | None:
        """Serve a call. Returns what a program can be made of, ``None`` where no other call agrees yet."""
        known = self._viewpoint.reachable() if self._latest is None else self._latest.written()
        look = self._viewpoint.here(call, [*call.arguments.tensors, *known])
        if look is None:
            return None
        if look.refusal:
            self.refusal = look.refusal
            return None
        self._latest, self._num_looks = look, self._num_looks + 1
        why = self._recordings.agreement(look, call.at)
        if why and not look.unsettled and len(self._recordings.seen) > 1:  # sizes differ from call to call
            why = self._look_again(call, look)
        if not why:
            return look
        self.unsettled = why if self._num_looks > 1 or look.unsettled else ""
        self.refusal = why if self._num_looks >= MAX_RECORDINGS else ""
        return None

    def _look_again(self, call: Incoming, look: Look) -> str:
        """Look a second time at a call that was served, of which nothing is left. Returns why they do not agree."""
        try:
            again = look_unseen(call, self._viewpoint, look.written(), {}, _SPARE_BYTES)
        except NoRoom as error:  # another call of one of these sizes will tell
            self._num_looks -= len(self._recordings.seen) < _MAX_SIZES
            return str(error)
        again.result = None
        return again.refusal or self._recordings.agreement(again, call.at)
