"""The text of compiled programs, by one that is written by hand in the form that libtpu prints."""

from __future__ import annotations

from pathlib import Path

import pytest

from jax_selftrain.planning.hlo_cost import HloModule

TEXT = Path(__file__).with_name("two_loops.hlo").read_text()
"""A loop of six turns around a loop whose turns are a value; 4 chips. In fast memory: S(1)."""


def test_loops_run_as_often_as_their_conditions_and_the_caller_say():
    text = HloModule(TEXT, loop_trip_counts=(2.5,))
    assert text.execution_counts == {"main": 1, "layer": 6, "block": 15}
    with pytest.raises(ValueError, match="the trip count of the loop inner is unknown"):
        _ = HloModule(TEXT).execution_counts


def test_traffic_is_what_main_memory_sees():
    slice_read = 512 * 512 * 2 + 4  # of one layer, into fast memory, and which layer
    scatter = 512 * 512 * 4 + 128 * 512 * 4
    copied = 8 * 128 * 4  # from main memory into fast memory
    assert HloModule(TEXT, (2.5,)).traffic == 6 * (slice_read + scatter) + 15 * copied


def test_collectives_are_told_by_kind_with_what_each_chip_receives():
    gather, scatter = HloModule(TEXT, (2.5,)).collectives()
    assert (gather.kind, gather.participants, gather.count) == ("all-gather", 4, 6)
    assert gather.bytes == 6 * 4 * 512 * 512 * 2
    assert gather.bytes_received == gather.bytes * 3 / 4
    assert (scatter.kind, scatter.count, scatter.bytes) == ("reduce-scatter", 6, 6 * 512 * 512 * 4)


def test_a_collective_that_is_fused_piece_by_piece_counts_once():
    """Pieces share a chain; collectives of a `shard_map` share a channel, and count each."""
    line = next(line for line in TEXT.splitlines() if "all-gather(" in line)
    names = ("one", "two", "three")

    def beside(*attributes: str) -> str:
        added = [
            f"{line.replace('%whole', f'%{name}')}, frontend_attributes={{{attribute}}}"
            for name, attribute in zip(names, attributes, strict=True)
        ]
        return TEXT.replace(line, "\n".join([line, *added]))

    (plain, _), (pieces, _), (apart, _) = (
        HloModule(text, (2.5,)).collectives()
        for text in (TEXT, beside(*['chain_id="7"'] * 3), beside('chain_id="7"', 'chain_id="8"', ""))
    )
    assert plain.count == 6
    assert pieces.count == 12
    assert apart.count == 24
