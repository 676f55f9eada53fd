"""Capture without Dynamo: a call is recorded operator by operator, and what was recorded becomes a program.

In reading order:

======================================  ===========================================================================
what happens on a call                  ``target.py``, ``key.py`` (which calls are alike), ``entry.py``
one call, watched                       ``record.py``, ``calls.py`` (what it consists of), ``limits.py``
the Python state around it              ``state.py`` (what can be reached), ``outside.py``, ``watch.py``, ``result.py``
from calls to a program                 ``program.py``, ``groups.py`` (what is one step), ``writer.py`` (its function)
a replay against the function itself    ``check.py``
======================================  ===========================================================================

``current.py`` tells ``@graphcap.eager`` functions that they are being recorded.
"""
