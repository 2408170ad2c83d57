"""Roles of options and the lists derived from them."""

from dataclasses import replace

import pytest

from jax_selftrain import config
from jax_selftrain.config import ArmConfig, ExtractConfig, PromptFormat, SampleConfig, TrainConfig, yaml_io
from jax_selftrain.config.metadata import (
    Role,
    applicable_kinds,
    fields_with_role,
    keep_role,
    roles,
    shared_overrides,
)

CONFIGS = [value for value in vars(config).values() if isinstance(value, type)]
FIRST = (Role.IDENTITY, Role.EXECUTION, Role.INPUT, Role.OUTPUT_FOLDER, Role.OUTPUT_FILE)


@pytest.mark.parametrize("cls", CONFIGS, ids=lambda cls: cls.__name__)
def test_every_option_has_exactly_one_first_role(cls: type):
    for name, role in roles(cls).items():
        assert sum(one in role for one in FIRST) == 1, name


def test_a_field_without_a_role_is_part_of_the_identity():
    assert roles(SampleConfig)["temperature"] == Role.IDENTITY


def test_execution_options_of_training_do_not_change_its_result():
    assert set(fields_with_role(TrainConfig, Role.EXECUTION)) == {
        *("max_epochs", "remat", "checkpoint_every", "keep", "keep_every", "wandb", "log_every", "mesh", "preset")
    }


def test_roles_can_be_queried_together():
    assert fields_with_role(config.LeakageConfig, Role.INPUT | Role.OUTPUT) == ("corpus", "texts", "out", "tokenizer")


def test_keep_role_resets_the_other_options():
    options = TrainConfig(model="m", learning_rate=0.5, beta1=0.5, log_every=7)
    assert keep_role(options, Role.COMPILED) == TrainConfig(beta1=0.5)


def test_shared_overrides_hold_what_is_set_in_both():
    arm = ArmConfig("cool", temperature=0.5, learning_rate=0.1)
    assert shared_overrides(arm, SampleConfig) == {"temperature": 0.5}
    assert shared_overrides(PromptFormat("long", prefix=64), ExtractConfig) == {"prefix": 64}


def test_options_of_an_arm_apply_to_kinds_of_arm():
    assert applicable_kinds(ArmConfig, "generations") == ("generations",)
    assert "noise" not in (applicable_kinds(ArmConfig, "learning_rate") or ())
    assert applicable_kinds(ArmConfig, "name") is None


def test_identity_options_are_plain_data():
    options = replace(SampleConfig(), model="m", batch_size=3, stop_ids=(1, 2))
    assert yaml_io.to_dict(options, Role.IDENTITY).keys() == set(fields_with_role(SampleConfig, Role.IDENTITY))
    assert "batch_size" not in yaml_io.to_dict(options, Role.IDENTITY)
