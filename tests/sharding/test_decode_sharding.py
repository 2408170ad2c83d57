"""Tests of `decode` on several devices."""

import numpy as np
import pytest
from sampling_reference import ENDING, SAMPLE_FIELDS, SmallModel


@pytest.mark.parametrize(
    ("spec", "num_samples"),
    [
        ("data=2,model=1", 70),
        pytest.param("data=1,model=1", 150, marks=pytest.mark.nightly),
        pytest.param("data=4,model=1", 150, marks=pytest.mark.nightly),
    ],
)
def test_refilled_slots_draw_the_samples_of_static_batches(spec, num_samples):
    """Samples start at other steps, in other slots, with other neighbors."""
    model, ids, num_slots = SmallModel(spec), np.arange(num_samples), 16
    replicas = model.spec.sharding_rules.data_parallelism
    static = [
        model.draw(ENDING, part, num_slots=num_slots, queue_size=num_slots)
        for part in np.split(ids, range(num_slots * replicas, num_samples, num_slots * replicas))
    ]
    refilled = model.draw(ENDING, ids, num_slots=num_slots)
    for name in SAMPLE_FIELDS:
        expected = np.concatenate([getattr(batch, name) for batch in static])
        np.testing.assert_array_equal(getattr(refilled, name), expected)
    assert refilled.slot_steps < sum(batch.slot_steps for batch in static)
    assert refilled.utilization == refilled.lengths.sum() / refilled.slot_steps
