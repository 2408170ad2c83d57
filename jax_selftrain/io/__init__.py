"""Atomic writes, checksums, leases: the leaf modules that touch the disk."""
