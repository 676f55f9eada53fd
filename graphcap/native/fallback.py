"""The checks in Python: the contract of both implementations, and what runs where there is no extension.

Microseconds per call that holds, best of seven runs on one core of a two-core AMD EPYC virtual machine, Python 3.11,
everything in the processor's caches: 227 parameters, and 430 dict entries of the module tree that they belong to.

=====================================================  ==========  ==========
..                                                     torch 2.11  torch 2.13
=====================================================  ==========  ==========
AddressCheck, extension                                       1.7         1.7
AddressCheck, Python                                           21          23
torch's own (``_tensors_data_ptrs_at_indices_equal``)          14           -
IdentityCheck, extension                                      3.5         3.6
IdentityCheck, Python                                          26          26
=====================================================  ==========  ==========
"""

from graphcap.native.objects import AnswerCheck, Entry, IdentityCheck, Question, Sized
from graphcap.native.places import AddressCheck, ApartCheck, GroupedCopy
from graphcap.native.state import StateCheck
from graphcap.native.thread_state import ThreadState

__all__ = [
    "AddressCheck",
    "AnswerCheck",
    "ApartCheck",
    "Entry",
    "GroupedCopy",
    "IdentityCheck",
    "Question",
    "Sized",
    "StateCheck",
    "ThreadState",
]
