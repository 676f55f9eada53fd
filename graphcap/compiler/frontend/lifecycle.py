"""The end of graphs: of one model for a while (``release``), or of everything in the process (``reset``).

Plans also go by themselves: with the model, with ``torch.compiler.reset()``, and when Dynamo drops the code that calls
them. The memory pool of a device goes with its last plan.

A graph that has recorded NCCL work holds on to its communicator, and destroying the communicator first may hang. So
``graphcap.reset()`` comes before ``torch.distributed.destroy_process_group()``. A process that never destroys its
groups is covered: plans are dropped when it ends.
"""

from __future__ import annotations

import gc
from typing import Any

from graphcap.compiler.breakable.target import forget_recordings
from graphcap.compiler.frontend import dynamo
from graphcap.compiler.frontend.subject import runners_of
from graphcap.compiler.region import all_regions, forget_regions


def release(target: Any) -> None:
    """Drop the graphs of a model and, where they were the last ones in it, the memory pool. Compiled code stays.

    Waits for the replays that are running. The next call of each shape captures again, where captures are allowed, so
    that it suits an engine that goes to sleep: release, move or drop the weights, load them again, go on. Weights need
    not come back to where they
    were. In a process group every rank calls it, and waits for the others.

    Args:
        target: a module, what ``torch.compile`` or ``graphcap.compile`` returned, a function or a bound method.
            Other instances that share a compiled graph with it keep theirs.

    Raises:
        TypeError: ``target`` is nothing that could have been compiled.
        RankError: another rank of the model's process group does something else. Nothing has been dropped.
    """
    runners = runners_of(target)
    for agreement in dict.fromkeys(runner.agreement for runner in runners):
        agreement.gather("graphcap.release()", None, usual=None)
    for runner in runners:
        runner.release()


def reset() -> None:
    """Drop everything: the graphs of all models with their pools, and the compiled code of every region.

    The next call of a model traces or records, and captures again (compiled pieces come from the cache). Settings,
    registered ops and hooks stay. Call it before ``torch.distributed.destroy_process_group()`` when graphs contain
    collectives.
    """
    for region in all_regions():
        for runner in region.runners:
            runner.release()
        if region.code is not None:
            dynamo.forget(region.code)
    forget_recordings()
    forget_regions()
    gc.collect()
