"""What a replay asks and copies on every call, in microseconds: small C++ types, built on the user's machine in the
background, and the same in Python until they are there.

In reading order: :mod:`~graphcap.native.places`, :mod:`~graphcap.native.objects`, :mod:`~graphcap.native.state` and
:mod:`~graphcap.native.thread_state` (the contracts, in Python; together :mod:`~graphcap.native.fallback`),
``checks.cpp`` with a header for each of these (the same in C++; ``vectorcall.h`` is what their types share),
:mod:`~graphcap.native.extension` (which of them is used), :mod:`~graphcap.native.build` and
:mod:`~graphcap.native.loader` (how the extension is made and found). ``GRAPHCAP_NATIVE=0`` switches it off.
:mod:`~graphcap.native.layouts` is a check of torch's own.
"""

from graphcap.native.extension import AddressCheck, Extension, IdentityCheck
from graphcap.native.layouts import layout_check
from graphcap.native.state import tells_of_writes

_of_this_process = Extension()

address_check = _of_this_process.address_check
answer_check = _of_this_process.answer_check
apart_check = _of_this_process.apart_check
grouped_copy = _of_this_process.grouped_copy
state_check = _of_this_process.state_check
thread_state = _of_this_process.thread_state
identity_check = _of_this_process.identity_check
when_ready = _of_this_process.when_ready
status = _of_this_process.status
prepare = _of_this_process.prepare
look = _of_this_process.look

__all__ = [
    "AddressCheck",
    "IdentityCheck",
    "address_check",
    "answer_check",
    "apart_check",
    "grouped_copy",
    "identity_check",
    "layout_check",
    "look",
    "prepare",
    "state_check",
    "status",
    "tells_of_writes",
    "thread_state",
    "when_ready",
]
