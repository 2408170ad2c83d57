"""Several processes as one program: how they find each other, wait for each other, and what becomes of a lost one.

JAX's own multi-controller runtime is the engine: every process runs the same command, process 0 hosts the coordination
service, and arrays on a mesh of all devices are computed together. What is added here is how it ends.

*Start.* `--coordinator`, `--num-processes` and `--process-id`, or JAX's own detection of Cloud TPU, GKE, Slurm and Open
MPI. Without any of them nothing is started: one process, as ever.

*Waiting.* Barriers and messages go through the coordination service, not through collectives of the devices: these have
no time limit that could be set, and keep the devices busy.

*Loss.* JAX would answer the loss of any process by aborting all others. Here its `jax_enable_recoverability` is set, so
that it does nothing, and a thread asks the service every second who is still there. Work that needs everybody ends with
one sentence and exit code 75, from that thread, since the main thread may wait for the lost one within a collective for
ever. Work that needs nobody (`on_its_own`) goes on to its end.

*Loss of process 0.* The coordination service goes with it, which JAX answers by abort() whatever it has been told (its
callback for this case fails with std::bad_cast, in 0.10.2 as in 0.12.0.1). So abort() is caught: on the thread that
polls the service it is the loss of process 0, treated as any other; elsewhere it is a defect and takes its course.
"""

from jax_selftrain.distributed.cluster import DistributedConfig
from jax_selftrain.distributed.peers import current
from jax_selftrain.distributed.signals import sigterm_handler
from jax_selftrain.distributed.sync import (
    barrier,
    broadcast_one_to_all,
    distributed_context,
    hard_exit,
    live_processes,
    process_local,
)

__all__ = [
    "DistributedConfig",
    "barrier",
    "broadcast_one_to_all",
    "current",
    "distributed_context",
    "hard_exit",
    "live_processes",
    "process_local",
    "sigterm_handler",
]
