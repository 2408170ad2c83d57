"""Costs of a handwritten HLO program in the format of libtpu."""

from __future__ import annotations

from pathlib import Path

import pytest

from jax_selftrain.planning.hlo_cost import HloModule

TEXT = Path(__file__).with_name("two_loops.hlo").read_text()
"""A loop with trip count 6 around a loop with a dynamic trip count, on 4 chips; S(1) is fast memory."""


def test_execution_counts_follow_conditions_and_given_trip_counts():
    text = HloModule(TEXT, loop_trip_counts=(2.5,))
    assert text.execution_counts == {"main": 1, "layer": 6, "block": 15}
    with pytest.raises(ValueError, match="the trip count of the loop inner is unknown"):
        _ = HloModule(TEXT).execution_counts


def test_traffic_counts_main_memory_only():
    slice_read = 512 * 512 * 2 + 4  # of one layer, into fast memory, and which layer
    scatter = 512 * 512 * 4 + 128 * 512 * 4
    copied = 8 * 128 * 4  # from main memory into fast memory
    assert HloModule(TEXT, (2.5,)).traffic == 6 * (slice_read + scatter) + 15 * copied


def test_collectives_have_a_kind_and_received_bytes():
    gather, scatter = HloModule(TEXT, (2.5,)).collectives()
    assert (gather.kind, gather.participants, gather.count) == ("all-gather", 4, 6)
    assert gather.bytes == 6 * 4 * 512 * 512 * 2
    assert gather.bytes_received == gather.bytes * 3 / 4
    assert (scatter.kind, scatter.count, scatter.bytes) == ("reduce-scatter", 6, 6 * 512 * 512 * 4)


def test_a_collective_split_into_fused_pieces_counts_once():
    """Pieces share a chain; collectives of a `shard_map` share only a channel."""
    line = next(line for line in TEXT.splitlines() if "all-gather(" in line)
    names = ("one", "two", "three")

    def insert_pieces(*attributes: str) -> str:
        added = [
            f"{line.replace('%whole', f'%{name}')}, frontend_attributes={{{attribute}}}"
            for name, attribute in zip(names, attributes, strict=True)
        ]
        return TEXT.replace(line, "\n".join([line, *added]))

    (plain, _), (pieces, _), (apart, _) = (
        HloModule(text, (2.5,)).collectives()
        for text in (TEXT, insert_pieces(*['chain_id="7"'] * 3), insert_pieces('chain_id="7"', 'chain_id="8"', ""))
    )
    assert plain.count == 6
    assert pieces.count == 12
    assert apart.count == 24
