"""Where in the user's code something happens: the innermost frame outside of torch and of this package."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import NamedTuple

import torch

_NOT_THE_USERS = (f"{Path(torch.__file__).parent}{os.sep}", f"{Path(__file__).parents[2]}{os.sep}", "<")

#: The names of the modules of the target that is being recorded, by ``id``.
module_names: ContextVar[Mapping[int, str]] = ContextVar("graphcap_module_names")


class Origin(NamedTuple):
    """``file:line``, the function around it and the path of the module whose method that is."""

    location: str
    function: str
    module: str

    def __str__(self) -> str:
        return self.location or "an argument"


def here() -> Origin:
    """The origin of what is happening now."""
    frame = sys._getframe(1)
    names = module_names.get({})
    location = function = ""
    while frame is not None:
        code = frame.f_code
        if not code.co_filename.startswith(_NOT_THE_USERS):
            if not location:
                location, function = f"{code.co_filename}:{frame.f_lineno}", code.co_qualname
            if code.co_varnames[:1] == ("self",) and id(owner := frame.f_locals.get("self")) in names:
                return Origin(location, function, names[id(owner)])
        if frame.f_back is None:
            break
        frame = frame.f_back
    return Origin(location or "<unknown>", function, "")
