"""The processes that compute the workers' gradients: a single one, or as many as torchrun starts.

    from metamom import distributed

    with distributed.start() as world:
        learner.backward(world.sample(tasks, step, 32), workers=8, bias=TopK(ratio=0.05), world=world)

Processes get contiguous blocks of tasks and workers, so that training does not depend on the number of processes. One
rule keeps the others from waiting forever if one process fails: before they exchange tensors, all processes agree
(`World.agree`) that none has failed, and a process that fails anywhere joins that same agreement.
"""

from metamom.common.choices import SERVERS, TIMEOUT, Server
from metamom.distributed.collectives import ProcessError
from metamom.distributed.messages import digest
from metamom.distributed.torchrun import start
from metamom.distributed.world import SAME, WEIGHTS_EVERY, World, as_world

__all__ = [
    "SAME",
    "SERVERS",
    "TIMEOUT",
    "WEIGHTS_EVERY",
    "ProcessError",
    "Server",
    "World",
    "as_world",
    "digest",
    "start",
]
