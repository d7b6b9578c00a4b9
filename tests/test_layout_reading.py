"""Maps that people wrote: Python source, KerasHub's own."""

from pathlib import Path
from typing import Any

import pytest

from autoshard.errors import AutoshardError, LayoutError, PlanFileError, UsageError
from autoshard.layout.reading import kerashub_rules, read_map
from autoshard.layout.rules import LayoutRules, Rule
from autoshard.layout.source import parse_map
from autoshard.mesh import Mesh

ANNOUNCED = """
import keras
from missing_package import nothing

print("never executed")
batch_dim, model_dim = "batch", "model"
device_mesh = keras.distribution.DeviceMesh((1, 8), [batch_dim, model_dim])
layout_map = keras.distribution.LayoutMap(device_mesh)
layout_map["token_embedding/embeddings"] = (model_dim, None)
layout_map["decoder_block.*(query|key|value).*kernel"] = (
    None, model_dim, None)
layout_map[r"decoder_block_\\d+/ffw_linear/kernel"] = keras.distribution.TensorLayout(
    [model_dim, None]
)
layout_map["decoder_block_\\d+/bias"] = TensorLayout(axes=("model",), device_mesh=device_mesh)
sizes["not a map"] = (1, 2)
"""


def parse_layout(source: str) -> LayoutRules:
    return parse_map(source).accepted()


def read_layout(layout: Any) -> LayoutRules:
    return read_map(layout).accepted()


def test_python_source_is_read_without_running_it() -> None:
    assert parse_layout(ANNOUNCED) == (
        Rule(pattern="token_embedding/embeddings", spec=("model", None)),
        Rule(pattern="decoder_block.*(query|key|value).*kernel", spec=(None, "model", None)),
        Rule(pattern=r"decoder_block_\d+/ffw_linear/kernel", spec=("model", None)),
        Rule(pattern=r"decoder_block_\d+/bias", spec=("model",)),
    )


def test_a_map_of_another_name_is_found_by_its_construction() -> None:
    source = 'lm = keras.distribution.LayoutMap(mesh)\nlm["a/kernel"] = ("model",)\n'
    assert parse_layout(source) == (Rule(pattern="a/kernel", spec=("model",)),)
    annotated = source.replace("lm =", "lm: LayoutMap =")
    assert parse_layout(annotated) == parse_layout(source)
    assert parse_layout('self.layout_map["a/kernel"] = (None,)') == (
        Rule(pattern="a/kernel", spec=(None,)),
    )
    both = 'layout_map["a/kernel"], layout_map["b/kernel"] = (None,), ("model",)'
    assert [rule.spec for rule in parse_layout(both)] == [(None,), ("model",)]


def test_a_map_that_an_object_holds_is_found_by_its_construction() -> None:
    source = 'self.lm = LayoutMap(mesh)\nself.lm["a/kernel"] = ("model",)\n'
    assert parse_layout(source) == (Rule(pattern="a/kernel", spec=("model",)),)


def test_another_name_of_a_map_is_that_map() -> None:
    source = 'lm = LayoutMap(mesh)\nrules = lm\nlm["a"] = ("x",)\nrules["b"] = ("y",)\n'
    assert [rule.pattern for rule in parse_layout(source)] == ["a", "b"]
    held = 'layout_map = None\nself.layout_map = layout_map\nlayout_map["a"] = ("x",)\n'
    assert [rule.pattern for rule in parse_layout(held)] == ["a"]


def test_the_main_part_of_a_script_is_no_condition() -> None:
    source = 'if __name__ == "__main__":\n    layout_map["a"] = ("x",)\n'
    assert [rule.pattern for rule in parse_layout(source)] == ["a"]


@pytest.mark.parametrize("second", ["layout_map", "another"])
def test_two_maps_in_one_source_are_not_read_as_one(second: str) -> None:
    made = "{0} = keras.distribution.LayoutMap(mesh)\n{0}['a/kernel'] = ('model',)\n"
    with pytest.raises(LayoutError, match=r"two maps, the first from line 2 on .* line 4 on"):
        parse_layout(made.format("layout_map") + made.format(second))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            'layout_map["a"] = ["model", None]',
            "the layout, line 1: cannot read ['model', None]: Keras takes a tuple and refuses a "
            'list; write ("model", None)',
        ),
        (
            'layout_map["a"] = ("model")',
            "the layout, line 1: cannot read 'model': a layout is a tuple of axis names and None, "
            'like ("model", None)',
        ),
        (
            'layout_map["a"] = (("x", "y"), None)',
            "the layout, line 1: cannot read ('x', 'y'): an axis has to be a string, or a name "
            "that is one string here",
        ),
        (
            'axis = "x"\naxis = "y"\nlayout_map["a"] = (axis,)',
            "the layout, line 3: cannot read axis: an axis has to be a string, or a name that is "
            "one string here",
        ),
        *(
            (
                f'axis = "x"\n{otherwise}\nlayout_map["a"] = (axis,)',
                "the layout, line 3: cannot read axis: an axis has to be a string, or a name that "
                "is one string here",
            )
            for otherwise in (
                "axis = other",
                'axis += "y"',
                'for axis in ("x", "y"): pass',
                "import axes as axis",
                "def f(axis): pass",
                'x, *axis = "xyz"',
            )
        ),
        (
            'layout_map[f"block_{k}"] = ("model",)',
            "the layout, line 1: cannot read f'block_{k}': a pattern has to be a string, or a name "
            "that is one string here; one regex, as block_\\d+, takes all blocks",
        ),
        (
            'layout_map.update({"a": ("model",)})',
            "the layout, line 1: cannot read layout_map.update({'a': ('model',)}): rules are read "
            "from layout_map[...] = (...) lines",
        ),
        (
            'layout_map["a"] = ("model",)\ndel layout_map["a"]',
            "the layout, line 2: cannot read del layout_map['a']: rules are read from "
            "layout_map[...] = (...) lines",
        ),
        (
            'layout_map = Backbone.get_layout_map(mesh)\nlayout_map["a"] = ("model",)',
            "the layout, line 1: cannot read Backbone.get_layout_map(mesh): the rules that it "
            "holds are not in this source",
        ),
        (
            'from maps import layout_map\nlayout_map["a"] = ("model",)',
            "the layout, line 1: cannot read from maps import layout_map: the rules that it holds "
            "are not in this source",
        ),
        (
            'maps["a"] = LayoutMap(mesh)\nmaps["a"]["b"] = ("model",)',
            "the layout, line 1: cannot read maps['a']: a LayoutMap is read under a name of its "
            "own",
        ),
        (
            'if large:\n    layout_map["a"] = ("model",)\nelse:\n    layout_map["a"] = (None,)',
            "the layout, line 2: cannot read layout_map['a']: whether it is set depends on a "
            "condition; give one map (check tells 1 more)",
        ),
        *(
            (
                f'{head}:\n    layout_map["a"] = ("model",)',
                "the layout, line 2: cannot read layout_map['a']: whether it is set depends on a "
                "condition; give one map",
            )
            for head in ("for x in y", "while x")
        ),
        (
            'try:\n    layout_map["a"] = ("model",)\nexcept E:\n    layout_map["b"] = ("model",)',
            "the layout, line 4: cannot read layout_map['b']: whether it is set depends on a "
            "condition; give one map",
        ),
        ("x = 1", "the layout holds no map; expected lines like layout_map[...] = (...)"),
        ("layout_map[", "the layout, line 1 is not Python source: '[' was never closed"),
        (
            'layout_map["a("] = ("model",)',
            "the layout, line 1: rule 'a(' is not a regular expression: missing ), unterminated "
            "subpattern at position 1; escape the character with a backslash if it is part of the "
            "path",
        ),
    ],
)
def test_source_that_holds_no_readable_map_is_refused_with_its_line(
    source: str, message: str
) -> None:
    with pytest.raises(LayoutError) as error:
        parse_layout(source)
    assert str(error.value) == message


def test_a_file_is_read_and_a_missing_one_named(tmp_path: Path) -> None:
    path = tmp_path / "map.py"
    path.write_text('layout_map["a/kernel"] = ("model",)\n')
    assert (
        read_layout(path) == read_layout(str(path)) == (Rule(pattern="a/kernel", spec=("model",)),)
    )
    with pytest.raises(UsageError) as error:
        read_layout("missing.py")
    assert str(error.value) == (
        "there is no layout 'missing.py'; give a plan's JSON file, a Python file with "
        "layout_map[...] = (...) lines, or the word kerashub"
    )


@pytest.mark.parametrize("content", [b"\xff\xfe", b"a = '\x00'"])
def test_a_file_that_is_no_text_is_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "map.py"
    path.write_bytes(content)
    with pytest.raises(AutoshardError):
        read_layout(path)
    with pytest.raises(PlanFileError, match="Is a directory"):
        read_layout(tmp_path)


def test_kerashub_gives_the_map_that_a_backbone_ships() -> None:
    from autoshard.model.keras_import import import_keras_hub

    keras_hub = import_keras_hub()
    rules = kerashub_rules(keras_hub.models.GemmaBackbone)
    assert rules[0] == Rule(pattern="token_embedding/embeddings", spec=("model", "batch"))
    assert len(rules) == 6
    mesh = Mesh(shape=(2, 4), axis_names=("data", "tensor"))
    assert kerashub_rules(keras_hub.models.GemmaBackbone, mesh)[0].spec == ("tensor", "data")
    with pytest.raises(LayoutError, match="KerasHub ships no map for BertBackbone"):
        kerashub_rules(keras_hub.models.BertBackbone)


def test_a_map_of_keras_and_a_dict_are_read_like_their_source() -> None:
    import keras

    mesh = keras.distribution.DeviceMesh(
        (1, 1), ("batch", "model"), keras.distribution.list_devices()[:1]
    )
    layout_map = keras.distribution.LayoutMap(mesh)
    layout_map["a/kernel"] = ("model", None)
    rules = (Rule(pattern="a/kernel", spec=("model", None)),)
    assert read_layout(layout_map) == read_layout({"a/kernel": ("model", None)}) == rules
    assert read_layout({}) == ()


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (
            {"a/kernel": "model"},
            "rule 'a/kernel': cannot read 'model': a layout is a tuple of axis names and None, "
            'like ("model", None)',
        ),
        (
            {"a/kernel": ("model", 1)},
            "rule 'a/kernel': cannot read ('model', 1): a layout is a tuple of axis names and "
            'None, like ("model", None)',
        ),
        ({3: ("model",)}, "cannot read rule 3: a pattern is a string"),
        (
            3,
            "the layout is 3; give a path, Python source, 'kerashub', a LayoutMap or a dict of "
            "patterns and specs",
        ),
    ],
)
def test_a_dict_that_is_no_map_is_refused_with_its_first_wrong_rule(
    layout: Any, message: str
) -> None:
    with pytest.raises(AutoshardError) as error:
        read_layout(layout)
    assert str(error.value) == message
    if isinstance(layout, dict):
        partly = read_map(layout | {"b": ()})
        assert partly.rules == (Rule(pattern="b", spec=()),)
        assert partly.unreadable == (message,)


def test_kerashub_without_a_model_is_wrong_usage() -> None:
    with pytest.raises(UsageError, match="give a KerasHub model with it"):
        read_layout("kerashub")
