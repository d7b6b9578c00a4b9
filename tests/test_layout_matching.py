"""Rules are matched as Keras' own LayoutMap matches them."""

import keras
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoshard.errors import LayoutError
from autoshard.layout.rules import Rule, format_pattern, format_rules, match
from autoshard.mesh import Spec

segments = st.sampled_from(["a", "b", "ab", "block_0", "block_12", "kernel", "output"])
paths = st.lists(segments, min_size=1, max_size=3).map("/".join)
pieces = st.sampled_from(["a", "b", "(a|b)", "block_\\d+", "block_.*", ".*", "kernel", "/", "a?"])
patterns = st.one_of(
    paths,
    st.lists(pieces, min_size=1, max_size=4).map("/".join),
    st.lists(pieces, min_size=1, max_size=4).map("".join),
)
specs = st.sampled_from([(None, "model"), ("model", None), ("batch",)])


@settings(deadline=None, max_examples=300)
@given(st.lists(st.tuples(patterns, specs), max_size=4, unique_by=lambda rule: rule[0]), paths)
def test_every_path_gets_what_keras_gives_it(pairs: list[tuple[str, Spec]], path: str) -> None:
    layout_map = keras.distribution.LayoutMap(None)
    for pattern, spec in pairs:
        layout_map[pattern] = spec
    rules = [Rule(pattern=pattern, spec=spec) for pattern, spec in pairs]
    try:
        layout = layout_map[path]
    except ValueError:
        with pytest.raises(LayoutError, match="Keras allows one"):
            match(rules, path)
    else:
        assert match(rules, path) == (None if layout is None else layout.axes)


def test_an_equal_key_wins_over_patterns_that_hit_too() -> None:
    rules = [Rule(pattern=".*", spec=(None,)), Rule(pattern="a/kernel", spec=("model",))]
    assert match(rules, "a/kernel") == ("model",)


def test_older_keras_takes_a_pattern_that_hits_a_part_of_the_path() -> None:
    rules = [Rule(pattern="ffw.kernel", spec=("model",))]
    assert match(rules, "block_0/ffw/kernel", "search") == ("model",)
    assert match(rules, "block_0/ffw/kernel", "fullmatch") is None


def test_two_hits_are_refused_with_both_patterns() -> None:
    rules = [Rule(pattern=".*kernel", spec=(None,)), Rule(pattern="a/.*", spec=("model",))]
    with pytest.raises(LayoutError) as error:
        match(rules, "a/kernel")
    assert str(error.value) == (
        "path 'a/kernel' is taken by 2 rules, '.*kernel' and 'a/.*'; Keras allows one: "
        "narrow all but one of them"
    )


def test_a_pattern_that_is_no_regular_expression_is_refused() -> None:
    with pytest.raises(LayoutError) as error:
        Rule(pattern="(query|key", spec=(None,))
    assert str(error.value) == (
        "rule '(query|key' is not a regular expression: missing ), unterminated subpattern at "
        "position 0; escape the character with a backslash if it is part of the path"
    )


@pytest.mark.parametrize("pattern", ["a/kernel", r"block_\d+/b", 'a"b', "a\\", "a\nb", "a'b\\\""])
def test_a_printed_pattern_reads_back(pattern: str) -> None:
    import ast

    assert ast.literal_eval(format_pattern(pattern)) == pattern


def test_rules_print_as_a_person_writes_them() -> None:
    rules = [
        Rule(pattern="token_embedding/embeddings", spec=("model", None)),
        Rule(pattern=r"block_\d+/bias", spec=("model",)),
    ]
    assert format_rules(rules) == (
        'layout_map["token_embedding/embeddings"] = ("model", None)\n'
        'layout_map[r"block_\\d+/bias"] = ("model",)'
    )
