"""URIs of object storage (`gs://…`, `s3://…`) as inputs and outputs.

fsspec opens the stores. They have no rename, leases, memory maps or appends, so all work is done in a local copy.
Inputs are downloaded before a command starts. Outputs are downloaded, too, so that another machine can resume, and
uploaded periodically and at the end. `.NAME.files.json` lists the files of an output and is written after their
upload: a reader never sees half an output. `.NAME.writer.json` holds the heartbeat of the one writer; another machine
takes over after two minutes without one. Several processes share a bucket that each machine mounts. A local copy has
a generation; if the list bears another one, files that were never uploaded are moved to a separate folder.
"""

from jax_selftrain.remote.uris import download, gcsfuse_mount, localize_uris, synced_output

__all__ = ["download", "gcsfuse_mount", "localize_uris", "synced_output"]
