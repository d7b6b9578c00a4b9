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


@pytest.mark.parametrize("class_name", sorted({p.class_name for p in catalogue.find()}))
def test_every_preset_has_the_parameters_it_states(class_name) -> None:
    counted: dict[str, int] = {}
    wrong = {}
    for preset in catalogue.find():
        if preset.class_name != class_name:
            continue
        # Presets that differ in weights alone share a configuration: 343 presets, 200 of them.
        if preset.config_json not in counted:
            counted[preset.config_json] = build(preset.name).table().n_parameters
        if counted[preset.config_json] != preset.n_parameters:
            wrong[preset.name] = (counted[preset.config_json], preset.n_parameters)
    assert not wrong
