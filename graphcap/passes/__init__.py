"""Rewrites of the graphs that Inductor compiles. :mod:`graphcap.passes.pipeline` lists them and is the place to start.

Importing this package registers the ops that rewritten graphs call, so it must come before an artifact is loaded.
"""

from graphcap.passes import kernels as kernels
from graphcap.passes.base import GraphPass, PassResult
from graphcap.passes.pipeline import PassPipeline, stages

__all__ = ["GraphPass", "PassPipeline", "PassResult", "stages"]
