"""The order in which a descent takes its moves."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from autoshard.cost.values import Memory, StepCost
from autoshard.mesh import Spec, parse_mesh
from autoshard.search.candidates import NO_RULE, Choices
from autoshard.search.descent import Scored, descend
from autoshard.search.moves import make_moves

WEIGHT, OUTPUT = "layer/kernel", "layer/output"
SPLIT = ("model", None)


@dataclass(frozen=True)
class Found:
    assignment: tuple[tuple[str, Spec], ...]
    rank: float


class Table:
    """Scores the four assignments of a weight and an output by what a table says."""

    mesh = parse_mesh("1x8")
    is_spent = False

    def __init__(self, costs: Mapping[tuple[bool, bool], float]) -> None:
        self._costs = costs

    def score(self, assignment: Mapping[str, Spec]) -> Found:
        key = (assignment.get(WEIGHT) == SPLIT, assignment.get(OUTPUT) == SPLIT)
        laid = tuple(item for item in assignment.items() if item[1] != NO_RULE)
        return Found(assignment=laid, rank=self._costs[key])


def output(name: str) -> Choices:
    return Choices(
        name=name,
        shape=(8, 8),
        specs=(NO_RULE, SPLIT),
        siblings="o",
        n_bytes=64,
        is_output=True,
    )


def test_neither_a_weight_nor_an_output_bars_the_way_to_the_other() -> None:
    families = [
        Choices(name=WEIGHT, shape=(8, 8), specs=((None, None), SPLIT), siblings="w", n_bytes=64),
        output(OUTPUT),
    ]
    start = {WEIGHT: (None, None), OUTPUT: NO_RULE}
    for best in ((True, False), (False, True)):
        costs = {(False, False): 10.0, (True, True): 12.0, (True, False): 9.0, (False, True): 9.0}
        scorer: Any = Table({**costs, best: 7.0})
        found: Any = descend(scorer, families, [start])
        assert found.rank == 7.0


def test_of_outputs_laid_out_together_those_that_gain_nothing_lose_their_rule() -> None:
    class OneGains(Table):
        def score(self, assignment: Mapping[str, Spec]) -> Found:
            laid = tuple(item for item in assignment.items() if item[1] != NO_RULE)
            seconds = 5.0 if ("first/output", SPLIT) in laid else 10.0
            return Found(assignment=laid, rank=seconds * (1 + 0.01 * len(laid)))

    families = [output("first/output"), output("second/output")]
    scorer: Any = OneGains({})
    found: Any = descend(scorer, families, [{choices.name: NO_RULE for choices in families}])
    assert found.assignment == (("first/output", SPLIT),)


def test_half_the_memory_is_worth_a_little_time_and_not_more() -> None:
    def scored(seconds: float, peak_bytes: int) -> Scored:
        cost = StepCost(
            compute_seconds=seconds,
            blocking_seconds=0.0,
            overlapped_seconds=0.0,
            traffic=(),
            memory=Memory(weights=peak_bytes),
        )
        return Scored(assignment=(), cost=cost, excess_bytes=0)

    whole = scored(1.0, 2**31)
    assert scored(1.005, 2**30).rank < whole.rank < scored(1.01, 2**30).rank
    assert scored(1.0, 2**31 - 1).rank < whole.rank


def test_shakes_lay_out_only_what_is_legal() -> None:
    wide = Choices(
        name="wide",
        shape=(64, 128),
        specs=((None, None), ("model", None), (None, "model")),
        siblings="tied",
        n_bytes=64,
    )
    odd = replace(wide, name="odd", shape=(64, 100), specs=wide.specs[:2])
    asked = set()

    class Flat:
        """Scores that tell nothing apart."""

        mesh = parse_mesh("1x8")
        is_spent = False

        def score(self, assignment: Mapping[str, Spec]) -> Found:
            asked.add(assignment["odd"])
            return Found(assignment=tuple(assignment.items()), rank=1.0)

    scorer: Any = Flat()
    descend(scorer, [wide, odd], [{"wide": (None, None), "odd": (None, None)}], n_shakes=20)
    assert asked == set(odd.specs)


def test_shakes_come_to_what_takes_two_weights_and_two_outputs_at_once() -> None:
    weights = [
        Choices(name=name, shape=(8, 8), specs=((None, None), SPLIT), siblings=name, n_bytes=64)
        for name in ("one/kernel", "other/kernel")
    ]
    outputs = [
        replace(output(name), siblings=name) for name in ("first/block/output", "last/norm/output")
    ]

    class AllOrNone(Table):
        def score(self, assignment: Mapping[str, Spec]) -> Found:
            laid = tuple(item for item in assignment.items() if item[1] != NO_RULE)
            n_split = sum(any(spec) for _, spec in laid)
            return Found(assignment=laid, rank=5.0 if n_split == 4 else 10.0 + n_split)

    families = [*weights, *outputs]
    start = {choices.name: choices.specs[0] for choices in families}
    for n_shakes, rank in ((0, 10.0), (40, 5.0)):
        scorer: Any = AllOrNone({})
        found: Any = descend(scorer, families, [start], n_shakes=n_shakes)
        assert found.rank == rank


def test_a_bias_follows_its_weight_where_that_pays() -> None:
    class FollowedPays(Table):
        """Split weights pay only beside a split bias, and a split bias only beside these."""

        def score(self, assignment: Mapping[str, Spec]) -> Found:
            split = [any(assignment.get(name, ())) for name in ("layer/kernel", "layer/bias")]
            seconds = {(False, False): 10.0, (True, True): 7.0, (True, False): 9.0}
            found = seconds.get((split[0], split[1]), 12.0)
            return Found(assignment=tuple(assignment.items()), rank=found)

    columns = (None, "model")
    kernel = Choices(
        name=WEIGHT, shape=(8, 8), specs=((None, None), columns), siblings="w", n_bytes=64
    )
    bias = Choices(
        name="layer/bias",
        shape=(8,),
        specs=((None,), ("model",)),
        siblings="b",
        n_bytes=8,
        follows=WEIGHT,
    )
    scorer: Any = FollowedPays({})
    start = {WEIGHT: (None, None), "layer/bias": (None,)}
    found: Any = descend(scorer, [kernel, bias], [start])
    assert dict(found.assignment) == {WEIGHT: columns, "layer/bias": ("model",)}
    # What is split goes where the weight goes.
    (put, *_) = [one for one in make_moves([kernel, bias], Table.mesh) if one.of != "outputs"]
    both = {WEIGHT: columns, "layer/bias": ("model",)}
    assert put.change(both) == {WEIGHT: (None, None), "layer/bias": (None,)}
