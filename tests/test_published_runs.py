"""Predictions beside times that others measured on hardware."""

from autoshard.comparison import compare
from autoshard.layout.published import ANNOUNCEMENT_MAP
from autoshard.layout.rules import format_rules


def test_gemmas_old_and_present_map_are_ordered_as_on_a_tpu_v3_8() -> None:
    # keras-hub pull request 1491, a LoRA step of Gemma on a TPUv3-8: 125 ms under the map of the
    # announcement, 64 ms under the one that ships since. Size and batch are not stated there: these
    # are those at which the compiler's own clock comes within 15% of both.
    old = format_rules(ANNOUNCEMENT_MAP)
    found = compare(
        "gemma_7b_en",
        [old, "kerashub", "autoshard"],
        "1x8",
        target="tpu:v3:2x2",
        workload="lora",
        lora_rank=4,
        batch=4,
        seq_len=128,
    )
    assert [layout.name for layout in found.layouts] == ["autoshard", "kerashub", "source"]
    seconds = {layout.name: layout.predicted for layout in found.layouts}
    assert seconds["source"] is not None and seconds["kerashub"] is not None
    measured = 125 / 64
    ratio = seconds["source"].step_seconds / seconds["kerashub"].step_seconds
    assert 0.8 * measured < ratio < 1.25 * measured
