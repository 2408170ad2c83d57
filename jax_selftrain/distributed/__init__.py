"""Device meshes, sharding rules, and programs of several processes.

Every process runs the same command; process 0 hosts the coordination service. Barriers and messages use this service:
device collectives have no timeout. JAX aborts all processes when one is lost. Here `jax_enable_recoverability` prevents
that, and a thread polls the live processes (`peers`). Collective work then ends with one sentence and exit code 75;
process-local work continues.
"""

from jax_selftrain.distributed.signals import sigterm_event, sigterm_handler
from jax_selftrain.distributed.sync import barrier, broadcast_one_to_all, live_processes, process_local

__all__ = ["barrier", "broadcast_one_to_all", "live_processes", "process_local", "sigterm_event", "sigterm_handler"]
