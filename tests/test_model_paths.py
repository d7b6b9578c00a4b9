"""Which numbers of a path count blocks, and which Keras hands out."""

import re

import pytest

from autoshard.model.paths import path_templates, ranked


def test_a_number_that_counts_blocks_becomes_a_star() -> None:
    paths = [f"decoder_block_{i}/attention/query/kernel" for i in range(3)]
    assert set(path_templates(paths).values()) == {"decoder_block_*/attention/query/kernel"}


def test_a_process_wide_counter_inside_a_block_is_left_out() -> None:
    # The first layer of a counter has no number.
    paths = ["block_0/moe/gate/kernel", "block_1/moe_1/gate/kernel", "block_2/moe_2/gate/kernel"]
    assert set(path_templates(paths).values()) == {"block_*/moe/gate/kernel"}


def test_numbers_that_tell_two_layers_of_every_block_apart_stay() -> None:
    paths = [f"block_{i}/mlp/dense_{j}/kernel" for i in range(2) for j in (1, 2)]
    assert set(path_templates(paths).values()) == {
        "block_*/mlp/dense_1/kernel",
        "block_*/mlp/dense_2/kernel",
    }


def test_plain_layers_at_the_root_are_not_blocks() -> None:
    paths = ["dense/kernel", "dense_1/kernel", "dense_2/kernel"]
    assert list(path_templates(paths).values()) == paths


def test_the_output_of_a_block_has_the_template_of_the_block() -> None:
    paths = ["block_0/norm/scale", "block_1/norm/scale", "block_0/output", "block_1/output"]
    assert path_templates(paths)["block_1/output"] == "block_*/output"


def test_ranks_forget_where_a_counter_stood() -> None:
    first = ["block_0/moe/kernel", "block_1/moe_1/kernel", "norm/scale"]
    second = ["block_0/moe_32/kernel", "block_1/moe_33/kernel", "norm_7/scale"]
    assert ranked(first) == ranked(second)


def test_blocks_written_out_in_one_model_are_blocks() -> None:
    names = ("norm_{}/scale", "attention_{}/query/kernel", "up_{}/kernel", "down_{}/kernel")
    paths = [name.format(k) for k in range(3) for name in (*names, "add_{}/output")]
    templates = path_templates([*paths, "head/kernel"])
    assert set(templates.values()) == {name.format("*") for name in (*names, "add_{}/output")} | {
        "head/kernel"
    }


def test_blocks_written_out_with_the_number_inside_their_names_are_blocks() -> None:
    names = ("conformer_{0}_up_1/conformer_{0}_up_1_dense/kernel", "conformer_{0}_down/kernel")
    names += ("conformer_{0}_norm/scale", "conformer_{0}_add/output")
    paths = [name.format(k) for k in range(12) for name in names]
    templates = path_templates([*paths, "norm_0_scale/scale"])
    assert templates == {path: re.sub(r"_\d+_(?!dense)", "_*_", path) for path in paths} | {
        "norm_0_scale/scale": "norm_0_scale/scale"
    }


@pytest.mark.parametrize(
    "names",
    [
        ("dense_{}/kernel", "norm_{}/scale"),  # any chain of layers
        ("dense_{}/kernel", "norm_{}/scale", "add_{}/output"),
    ],
)
def test_two_kinds_of_layers_in_a_row_are_no_blocks(names: tuple[str, ...]) -> None:
    paths = [name.format(k) for k in range(3) for name in names]
    assert path_templates(paths) == {path: path for path in paths}


def test_layers_that_keras_numbers_are_no_blocks() -> None:
    """The first of each kind has no number."""
    kinds = ("dense", "norm", "conv", "embedding")
    paths = [f"{kind}{number}/kernel" for number in ("", "_1", "_2") for kind in kinds]
    assert path_templates(paths) == {path: path for path in paths}
