"""Tests of `decode` on several devices."""

import numpy as np
import pytest
from sampling_reference import ENDING, SAMPLE_FIELDS, SmallModel


@pytest.mark.parametrize(
    ("spec", "num_slots"),
    [
        pytest.param("data=1,model=1", 16, marks=pytest.mark.nightly),
        pytest.param("data=2,model=1", 16, marks=pytest.mark.nightly),
        ("data=4,model=1", 16),
    ],
)
def test_refilled_slots_draw_the_samples_of_static_batches(spec, num_slots):
    """Samples start at other steps, in other slots, with other neighbors."""
    model, ids = SmallModel(spec), np.arange(150)
    replicas = model.spec.sharding_rules.data_parallelism
    static = [
        model.draw(ENDING, part, num_slots=num_slots, queue_size=num_slots)
        for part in np.split(ids, range(16 * replicas, 150, 16 * replicas))
    ]
    refilled = model.draw(ENDING, ids, num_slots=num_slots)
    for name in SAMPLE_FIELDS:
        expected = np.concatenate([getattr(batch, name) for batch in static])
        np.testing.assert_array_equal(getattr(refilled, name), expected)
    assert refilled.slot_steps < sum(batch.slot_steps for batch in static)
    assert refilled.utilization == refilled.lengths.sum() / refilled.slot_steps
