"""Atomic writes, checksums, leases, work queue, JSONL and random streams."""
