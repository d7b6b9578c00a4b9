"""The catalogue, and every preset of it built without values."""

import pytest

from autoshard.errors import UnknownNameError
from autoshard.model import catalogue
from autoshard.model.build import build


def test_names_are_found_by_pattern_and_by_part() -> None:
    assert catalogue.names("gemma_7b_*") == ("gemma_7b_en",)
    assert "gemma_instruct_7b_en" in catalogue.names("7b")
    assert catalogue.names("no such") == ()
    assert len(catalogue.names()) == 343


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="did you mean .*gemma_7b_en") as caught:
        build("gema_7b_en")
    assert caught.value.exit_status == 2


def test_two_counts_come_with_a_reason() -> None:
    for name in catalogue.names():
        preset = catalogue.get(name)
        assert preset.note or preset.n_parameters == preset.n_registry_parameters


def test_every_preset_has_the_parameters_it_states() -> None:
    counted: dict[tuple[str, str], int] = {}
    wrong = {}
    for name in catalogue.names():
        preset = catalogue.get(name)
        # Presets that differ in weights alone share a configuration: 343 presets, 200 of them.
        key = (preset.class_name, preset.config_json)
        if key not in counted:
            counted[key] = build(name).table().n_parameters
        if counted[key] != preset.n_parameters:
            wrong[name] = (counted[key], preset.n_parameters)
    assert not wrong
