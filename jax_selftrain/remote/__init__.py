"""Paths in object storage (`gs://…`, `s3://…`, whatever fsspec opens): worked on in a local folder that mirrors them.

Results are committed by renaming, claimed by leases, mapped into memory and changed in place; object stores do none of
this, so all work is done in a local folder, as ever. What a command reads is fetched before it begins. What it writes
is fetched, too, so that it goes on where another machine stopped, and is sent while it works, every few seconds and
when it ends, however it ends.

**All or nothing.** An object beside the output (`.NAME.files.json`) lists what belongs to it and is written when all of
that has arrived: a machine that is lost while it sends leaves what the list said before, and no half of a folder.

**One writer.** Another object (`.NAME.writer.json`) says who writes, and is written anew every few seconds. A second
machine is refused while it changes, and takes over when it has not for two minutes; whoever has been taken over from
changes nothing any more.

**Several processes** write into one folder that all of them see: each of their machines mounts a bucket of `gs://`.

**Nothing local is lost.** A mirror has a mark, which the list bears when it was the last to write. Then what is here is
newer than what is there, and stays. Else the store is right, and what is here and was never sent is put aside.
"""

from jax_selftrain.remote.uris import download, gcsfuse_mount, localize_uris, synced_output

__all__ = ["download", "gcsfuse_mount", "localize_uris", "synced_output"]
