"""The table of chips: complete, sourced, and right where plans stand on it."""

import dataclasses
import json

import pytest

from autoshard.errors import UnknownNameError
from autoshard.hardware.chips import Chip, chip_names, get_chip, known_chips, source_texts
from autoshard.hardware.collectives import KINDS
from autoshard.report.chips import chips_json, chips_text

NOT_NUMBERS = {"name", "kind", "link_kind", "sources", "notes"}
GIB = 2**30

every_chip = pytest.mark.parametrize("chip", known_chips(), ids=chip_names())


@every_chip
def test_every_field_that_a_chip_states_names_its_sources(chip: Chip) -> None:
    stated = {
        field.name
        for field in dataclasses.fields(chip)
        if getattr(chip, field.name) not in (None, (), {}, field.default)
    }
    assert stated - NOT_NUMBERS <= {name for name, keys in chip.sources.items() if keys}
    assert set(chip.notes) <= set(chip.sources)


def test_sources_are_exactly_those_that_the_fields_name() -> None:
    named = {key for chip in known_chips() for keys in chip.sources.values() for key in keys}
    assert named == set(source_texts())


@every_chip
def test_every_chip_is_of_a_possible_size(chip: Chip) -> None:
    assert 1e9 < chip.flops_per_second("bfloat16") < 1e16
    assert 4 * GIB < chip.hbm_bytes < 512 * GIB
    assert 1e9 < chip.hbm_bytes_per_second < 1e13
    assert 1e9 < chip.link_bytes_per_second < chip.hbm_bytes_per_second
    assert chip.network_bytes_per_second < chip.link_bytes_per_second
    assert 0 < chip.matmul_efficiency_max < 1
    assert 0 < chip.hbm_write_efficiency <= chip.hbm_read_efficiency < 1
    assert set(chip.overlapped_collectives) <= set(KINDS)


@every_chip
def test_links_and_clock_are_stated_where_the_kind_needs_them(chip: Chip) -> None:
    is_tpu = chip.kind == "tpu"
    assert (chip.link_kind == "torus") == is_tpu
    assert (chip.clock_hz is not None) == is_tpu
    assert bool(chip.slices) == is_tpu
    assert (chip.on_chip_bytes_per_second is not None) == (chip.devices_per_chip == 2)
    assert bool(chip.devices_per_node) == (chip.kind == "gpu")


def test_a_v5e_is_what_google_prints_less_what_xla_reserves() -> None:
    v5e = get_chip("tpu:v5e")
    assert v5e.flops_per_second("bfloat16") == 197e12
    assert v5e.hbm_bytes == 15.75 * GIB
    assert v5e.link_bytes_per_second == 45e9
    assert v5e.clock_hz == 1.5e9
    assert v5e.overlapped_collectives == ("all-gather", "collective-permute")


def test_v2_v3_and_v7x_state_half_a_chip_as_a_device() -> None:
    # v3: 123 TFLOP/s and 900 GB/s a chip; v7x: 2,307 TFLOP/s a chip.
    assert get_chip("tpu:v3").flops_per_second("bfloat16") == 61.5e12
    assert get_chip("tpu:v3").hbm_bytes_per_second == 450e9
    assert get_chip("tpu:tpu7x").flops_per_second("bfloat16") == 1153.5e12
    two = [chip.name for chip in known_chips() if chip.devices_per_chip == 2]
    assert two == ["tpu:v2", "tpu:v3", "tpu:tpu7x"]


def test_a_clock_times_the_matrix_units_is_the_peak() -> None:
    # v5e: 4 units of 128 x 128, 2 FLOPs each a cycle: 131,072 x 1.5 GHz = 196.6 TFLOP/s.
    flops_per_cycle = {"tpu:v5e": 131072, "tpu:v3": 65536, "tpu:v5p": 262144, "tpu:v6e": 524288}
    for name, flops in flops_per_cycle.items():
        chip = get_chip(name)
        assert chip.clock_hz is not None
        assert flops * chip.clock_hz == pytest.approx(chip.flops_per_second("bfloat16"), rel=0.005)


def test_a_dtype_without_a_row_computes_as_bfloat16() -> None:
    h100, a100 = get_chip("gpu:h100-sxm"), get_chip("gpu:a100-80gb-sxm")
    assert h100.flops_per_second("float8_e4m3fn") == 1979e12
    assert a100.flops_per_second("float8_e4m3fn") == a100.flops_per_second("bfloat16") == 312e12
    assert a100.flops_per_second("float32") == 156e12


def test_an_unknown_chip_gives_the_nearest_names() -> None:
    with pytest.raises(UnknownNameError) as caught:
        get_chip("gpu:h100-sxn")
    assert caught.value.near[0] == "gpu:h100-sxm"
    assert str(caught.value).startswith("unknown chip 'gpu:h100-sxn'; did you mean gpu:h100-sxm")


def test_v7x_is_a_name_of_tpu7x() -> None:
    assert get_chip("tpu:v7x") is get_chip("TPU:tpu7x ")


def test_a_chip_can_be_a_key() -> None:
    assert len({chip: chip.name for chip in known_chips()}) == len(chip_names())


def test_the_table_shows_each_chip_once_and_resolves_each_footnote() -> None:
    text = chips_text(known_chips())
    table, _, notes = text.split("\n\n")
    rows = [line.split() for line in table.splitlines()[2:]]
    assert tuple(row[0] for row in rows) == chip_names()
    v5e = next(row for row in rows if row[0] == "tpu:v5e")
    assert v5e[1:8] == ["197", "15.75", "GiB", "819", "45", "torus", "1"]
    marks = {mark + "]" for row in rows for mark in row[-1].split("]") if mark}
    assert marks == {line.split()[0] for line in notes.splitlines()}


def test_the_json_has_every_field_and_every_source() -> None:
    data = json.loads(chips_json([get_chip("tpu:v5e")]))
    assert data["chips"]["tpu:v5e"]["hbm_bytes"] == 16911433728
    assert data["chips"]["tpu:v5e"]["sources"]["hbm_bytes"] == ["oom_generic"]
    assert data["sources"] == source_texts()
