"""The ops that passes put into a graph. Importing this package registers them with torch.

An artifact that calls one of these ops needs them registered before it is loaded.
"""

from graphcap.passes.kernels import add_rms_norm as add_rms_norm

__all__ = ["add_rms_norm"]
