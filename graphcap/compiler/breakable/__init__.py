"""Capture without Dynamo: a call is recorded operator by operator, and what was recorded becomes a program.

In reading order:

======================================  ===========================================================================
what happens on a call                  ``target.py``, ``key.py`` and ``sizes.py`` (which calls are alike),
                                        ``incoming.py`` (one call), ``entry.py`` (the calls of one key)
one call, watched                       ``look.py``, ``record.py``, ``numbering.py`` (its values), ``inside.py`` (live
                                        functions), ``calls.py`` (what a recording consists of), ``limits.py``
the Python state around it              ``state.py`` (what can be reached), ``outside.py``, ``watch.py``,
                                        ``hooked.py``, ``result.py``
from calls to a program                 ``learning.py``, ``agree.py`` (when two calls are one), ``recordings.py``,
                                        ``groups.py`` and ``steps.py`` (what is one step), ``writer.py`` (its
                                        function), ``program.py``
sizes                                   ``sized.py`` (a step at each size), ``rungs.py`` (which are recorded),
                                        ``padded_look.py``, ``output_sizes.py``, ``write_indices.py``
a replay against the function itself    ``due.py`` (when), ``check.py``, ``undo.py``, ``generators.py``
======================================  ===========================================================================

``current.py`` tells ``@graphcap.eager`` functions that they are being recorded.
"""
