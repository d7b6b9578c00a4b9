"""The variable table without Keras."""

import json

from autoshard.model.variables import ModelTable, dtype_bytes, make_table
from autoshard.report.inspect import INSPECT_FORMATS

ROWS = [
    ("embedding/embeddings", (10, 4), "bfloat16", True),
    ("block_0/dense/inner/kernel", (4, 8), "bfloat16", True),
    ("block_1/dense/inner/kernel", (4, 8), "bfloat16", True),
    ("block_2/dense/inner/kernel", (4, 6), "float32", False),
]


def test_counts_and_bytes_add_up() -> None:
    table = make_table("toy", ROWS)
    # 10*4 + 2 * 4*8 + 4*6 = 40 + 64 + 24; the last is frozen and has 4 bytes an element.
    assert table.n_parameters == 128
    assert table.n_trainable == 104
    assert table.n_bytes == 104 * 2 + 24 * 4


def test_a_template_of_two_shapes_makes_two_families() -> None:
    families = make_table("toy", ROWS).families()
    assert [(f.name, len(f.paths)) for f in families] == [
        ("embedding/embeddings", 1),
        ("block_*/dense/inner/kernel [4x8 bfloat16 trainable]", 2),
        ("block_*/dense/inner/kernel [4x6 float32 frozen]", 1),
    ]
    assert {f.template for f in families[1:]} == {"block_*/dense/inner/kernel"}


def test_every_variable_is_in_exactly_one_family() -> None:
    table = make_table("toy", ROWS)
    assert [p for f in table.families() for p in f.paths] == [v.path for v in table.variables]


def test_the_fingerprint_changes_with_a_shape_and_not_with_the_name() -> None:
    table = make_table("toy", ROWS)
    assert make_table("other", ROWS).fingerprint == table.fingerprint
    changed = [*ROWS[:3], ("block_2/dense/inner/kernel", (4, 7), "float32", False)]
    assert make_table("toy", changed).fingerprint != table.fingerprint


def test_the_json_names_every_variable() -> None:
    data = json.loads(INSPECT_FORMATS["json"](make_table("toy", ROWS)))
    assert list(data) == ["model", "parameters", "trainable_parameters", "bytes", "variables"]
    assert data["variables"][0] == {
        "path": "embedding/embeddings",
        "shape": [10, 4],
        "dtype": "bfloat16",
        "parameters": 40,
        "bytes": 80,
        "trainable": True,
        "family": "embedding/embeddings",
    }


def test_element_sizes() -> None:
    sizes = {"bool": 1, "int8": 1, "uint32": 4, "float8_e4m3fn": 1, "float16": 2, "float64": 8}
    assert {name: dtype_bytes(name) for name in sizes} == sizes


def test_the_dtype_of_a_table_is_that_of_most_bytes() -> None:
    def table(*weights: tuple[str, tuple[int, ...]]) -> ModelTable:
        named = [(f"w{i}", shape, dtype, True) for i, (dtype, shape) in enumerate(weights)]
        return make_table("model", named, (), ())

    assert table().dtype == ""
    assert table(("bfloat16", (8,)), ("float32", (3,)), ("bfloat16", (2,))).dtype == "bfloat16"
    assert table(("bfloat16", (8,)), ("float32", (5,))).dtype == "float32"
