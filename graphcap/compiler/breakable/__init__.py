"""Capture without Dynamo: a call is recorded operator by operator, and what was recorded becomes a program.

In reading order: :mod:`~graphcap.compiler.breakable.target` (what happens on a call),
:mod:`~graphcap.compiler.breakable.key` (which calls are alike), :mod:`~graphcap.compiler.breakable.record` (one call,
watched), :mod:`~graphcap.compiler.breakable.state` (the Python objects that it met),
:mod:`~graphcap.compiler.breakable.program` (from calls to steps), :mod:`~graphcap.compiler.breakable.entry` (the calls
of one key), :mod:`~graphcap.compiler.breakable.check` (a replay against the function itself).
"""
