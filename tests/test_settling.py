"""Compilers settle the ranking: what one candidate does there never hides the others."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace

import pytest
from test_planning import plan

import autoshard.planner.settling as settling
from autoshard.errors import ChildError, ChildTimeoutError, OutOfMemoryError, XlaError
from autoshard.hardware.targets import parse_target
from autoshard.layout.rules import LayoutRules
from autoshard.pipeline import make_plan
from autoshard.planner.planning import Planning
from autoshard.planner.settling import Verdict, settle, worth_compiling
from autoshard.planner.setup import make_setup
from autoshard.report.plan import plan_text
from autoshard.sharding_plan import Plan
from autoshard.xla.clock import step_time
from autoshard.xla.collectives import Collective
from autoshard.xla.compiled import CompiledStep, CompileRequest
from autoshard.xla.copies import SumOfCopies

TARGET = parse_target("tpu:v5e:2x4")

Compiler = Callable[[CompileRequest], CompiledStep]


@pytest.fixture(scope="module")
def planned() -> Planning:
    return plan("gemma_2b_en", make_setup("2x4", workload="prefill"))


@pytest.fixture
def planning(planned: Planning) -> Planning:
    """Of which nothing but the first three candidates is compiled."""
    no_rule = replace(planned.no_rule, scored=replace(planned.no_rule.scored, excess_bytes=1))
    first = planned.candidates[:3]
    return replace(planned, candidates=first, plain=None, by_hand=None, no_rule=no_rule)


def program(n_cycles: int) -> CompiledStep:
    return CompiledStep(
        target=str(TARGET),
        blocks=(),
        argument_bytes=2**30,
        temporary_bytes=0,
        output_bytes=0,
        alias_bytes=0,
        collectives=(),
        estimated_cycles=n_cycles,
    )


@pytest.fixture
def compiled_by(monkeypatch: pytest.MonkeyPatch) -> Callable[[Compiler, Compiler], None]:
    """Puts a made-up compiler in: shallow for the ranking, whole for the winner."""

    def put(shallow: Compiler, whole: Compiler) -> None:
        monkeypatch.setattr(settling, "child_environment", lambda _: {})
        monkeypatch.setattr(settling, "Child", lambda *_, **__: nullcontext())
        monkeypatch.setattr(settling, "compile_deep", lambda _, request, **__: shallow(request))
        monkeypatch.setattr(settling, "compile_in", lambda _, request, **__: whole(request))

    return put


@pytest.fixture
def verdicts(planning: Planning, compiled_by) -> Callable[..., list[Verdict]]:
    """The verdicts of a made-up compiler."""

    def settled(shallow: Compiler, whole: Compiler) -> list[Verdict]:
        compiled_by(shallow, whole)
        return list(settle("gemma_2b_en", planning, TARGET))

    return settled


@pytest.fixture
def ranked(planning: Planning) -> list[LayoutRules]:
    return [candidate.rules for candidate in planning.candidates[:3]]


@pytest.fixture
def in_order(ranked) -> Compiler:
    """A compiler that agrees with the ranking."""
    return lambda request: program((10 + ranked.index(request.rules)) * 10**7)


def names(verdicts: list[Verdict]) -> list[str]:
    return [verdict.candidate.name for verdict in verdicts]


def test_the_fastest_by_the_compiler_comes_first(verdicts, ranked) -> None:
    cycles = dict(zip(ranked, (300, 100, 200), strict=True))
    found = verdicts(lambda r: program(cycles[r.rules]), lambda r: program(cycles[r.rules]))
    assert names(found) == ["candidate 2", "candidate 3", "candidate 1"]


def test_a_winner_that_is_too_big_when_whole_makes_room_for_the_next(
    verdicts, ranked, in_order
) -> None:
    def whole(request: CompileRequest) -> CompiledStep:
        if request.rules == ranked[0]:
            raise OutOfMemoryError("it needs 17 GiB")
        return in_order(request)

    found = verdicts(in_order, whole)
    assert names(found) == ["candidate 2", "candidate 3", "candidate 1"]
    assert found[-1].fits is False
    assert found[-1].compiled is None


def test_a_partitioner_on_cpu_devices_is_asked_about_the_attention_of_the_target(
    planning, compiled_by
) -> None:
    asked = []

    def compile_it(request: CompileRequest) -> CompiledStep:
        asked.append((request.target, request.attention))
        return program(10**8)

    compiled_by(compile_it, compile_it)
    settle("gemma_2b_en", planning, parse_target("cpu:8"))
    assert set(asked) == {("cpu:8", "tpu:v5e")}


def test_of_two_that_are_as_fast_the_smaller_wins(planning, verdicts, ranked) -> None:
    memory = {c.rules: c.scored.cost.memory.peak_bytes for c in planning.candidates}
    found = verdicts(lambda _: program(10**8), lambda _: program(10**8))
    assert found[0].candidate.rules == min(ranked, key=memory.__getitem__)


def test_a_winner_that_is_slower_when_whole_is_held_against_the_next(verdicts, ranked) -> None:
    whole = {ranked[0]: 400, ranked[1]: 300, ranked[2]: 100}
    cycles = dict(zip(ranked, (200, 250, 350), strict=True))
    found = verdicts(lambda r: program(cycles[r.rules]), lambda r: program(whole[r.rules]))
    # the third is not compiled whole: when shallow it was slower than the second whole
    assert names(found) == ["candidate 2", "candidate 1", "candidate 3"]


def test_where_none_fits_when_whole_the_first_says_so(verdicts) -> None:
    def whole(request: CompileRequest) -> CompiledStep:
        raise OutOfMemoryError("it needs 17 GiB")

    found = verdicts(lambda _: program(10**8), whole)
    assert [verdict.fits for verdict in found] == [False, False, False]


def test_one_refused_layout_leaves_the_verdicts_of_the_others(verdicts, ranked, in_order) -> None:
    def shallow(request: CompileRequest) -> CompiledStep:
        if request.rules == ranked[0]:
            raise XlaError("no such layout")
        return in_order(request)

    found = verdicts(shallow, in_order)
    assert names(found) == ["candidate 2", "candidate 3", "candidate 1"]
    assert found[-1].error == "no such layout"


def test_a_layout_whose_program_adds_up_copies_is_passed_over(verdicts, ranked, in_order) -> None:
    def wrong(request: CompileRequest) -> CompiledStep:
        sums = (SumOfCopies(layer="conv", times=2.0),) if request.rules == ranked[0] else ()
        return replace(in_order(request), sums_of_copies=sums)

    found = verdicts(wrong, in_order)
    assert names(found)[0] == "candidate 2"
    assert "the gradient of conv comes out 2 times too large" in found[-1].error


def test_a_refused_layout_hides_none_that_is_too_big(verdicts, ranked, in_order) -> None:
    def shallow(request: CompileRequest) -> CompiledStep:
        if request.rules == ranked[0]:
            raise XlaError("no such layout")
        return replace(in_order(request), argument_bytes=2**50)

    found = verdicts(shallow, shallow)
    assert names(found) == ["candidate 2", "candidate 3", "candidate 1"]
    assert [verdict.fits for verdict in found] == [False, False, None]


def test_where_none_fits_even_shallow_the_nearest_is_said_not_to_fit(verdicts) -> None:
    def full(request: CompileRequest) -> CompiledStep:
        raise OutOfMemoryError("too big")

    found = verdicts(full, full)
    assert [(verdict.fits, verdict.error) for verdict in found] == [(False, "too big")] * 3


def test_the_targets_compiler_is_asked_about_the_split_by_hand_too(planned) -> None:
    first_three = planned.candidates[:3]
    assert planned.by_hand not in first_three
    assert worth_compiling(planned, TARGET) == (*first_three, planned.by_hand)
    # The partitioner for CPUs says nothing of compute.
    assert worth_compiling(planned, parse_target("cpu:8")) == first_three


def test_of_a_large_program_one_candidate_is_compiled(planned) -> None:
    steps = planned.traced.program
    traced = replace(planned.traced, program=replace(steps, ops=steps.ops * 100))
    large = replace(planned, traced=traced)
    assert worth_compiling(large, parse_target("cpu:8")) == planned.candidates[:1]


def test_a_model_as_small_as_its_copies_is_compiled_whole_and_once(planning, compiled_by) -> None:
    asked: list[CompileRequest] = []

    def compile_it(request: CompileRequest) -> CompiledStep:
        asked.append(request)
        return program(10**8)

    def never(request: CompileRequest) -> CompiledStep:
        raise AssertionError("compiled from copies")

    compiled_by(never, compile_it)
    folded = planning.traced.folded
    (stack,) = folded.folding.blocks
    few = replace(folded.folding, blocks=(replace(stack, n_blocks=6),))
    small = replace(planning, traced=replace(planning.traced, folded=replace(folded, folding=few)))
    first, *_ = settle("gemma_2b_en", small, TARGET)
    assert first.compiled is not None
    assert len(asked) == len({request.rules for request in asked}) == 3


def test_the_split_by_hand_is_not_compiled_where_it_is_far_behind_or_too_big(planned) -> None:
    hand = planned.by_hand
    slow = replace(hand.scored.cost, blocking_seconds=planned.candidates[0].scored.rank[1])
    for scored in (replace(hand.scored, cost=slow), replace(hand.scored, excess_bytes=1)):
        changed = replace(planned, by_hand=replace(hand, scored=scored))
        assert worth_compiling(changed, TARGET) == planned.candidates[:3]


def test_the_split_by_hand_can_win(planned, compiled_by, in_order) -> None:
    hand = planned.by_hand

    def compiled(request: CompileRequest) -> CompiledStep:
        return program(10**7) if request.rules == hand.rules else in_order(request)

    compiled_by(compiled, compiled)
    options = {"workload": "prefill", "target": TARGET, "verify": "target"}
    outcome = make_plan("gemma_2b_en", "2x4", top=3, **options)
    made = outcome.plan
    assert made.rules == hand.rules
    alternatives = [alternative.rules for alternative in made.alternatives]
    assert alternatives == [one.rules for one in outcome.planning.candidates]
    assert all(one.compiled is not None for one in made.alternatives)
    assert Plan.from_json(made.to_json()) == made
    text = plan_text(outcome)
    assert "-> split by hand" in text
    assert "\ncandidate 1\n" in text


def test_runners_up_are_those_compiled_and_then_the_others(planned, compiled_by) -> None:
    first, second, *others = (candidate.rules for candidate in planned.candidates)

    def compiled(request: CompileRequest) -> CompiledStep:
        return program(10**7 if request.rules == second else 10**8)

    compiled_by(compiled, compiled)
    made = make_plan("gemma_2b_en", "2x4", workload="prefill", target=TARGET, verify="target").plan
    assert made.rules == second
    told = [one.rules for one in made.alternatives if one.compiled is not None]
    assert {first, others[0]} <= set(told)
    untold = [one.rules for one in made.alternatives if one.compiled is None]
    assert untold == [rules for rules in others if rules not in told] != []
    assert [one.rules for one in made.alternatives] == told + untold


@pytest.mark.parametrize(("limit", "is_foreseen"), [("690MB", True), ("8GiB", False)])
def test_what_would_fit_is_said_where_the_compiler_refuses_too(
    limit: str, is_foreseen: bool, compiled_by
) -> None:
    def full(request: CompileRequest) -> CompiledStep:
        raise OutOfMemoryError("it needs 17 GiB")

    compiled_by(full, full)
    options = {"workload": "prefill", "target": TARGET, "memory_limit": limit, "batch": 64}
    outcome = make_plan("gemma_2b_en", "1x8", verify="target", **options)
    text = plan_text(outcome)
    assert "by the target's compiler: it needs 17 GiB" in text
    assert "  fits with --batch " in text
    assert outcome.winner.fits != is_foreseen
    # Where the plan fits by prediction, what would fit has to take less than it.
    peak = outcome.plan.predicted.peak_bytes_per_device
    assert all(remedy.peak_bytes <= peak for remedy in outcome.advice.remedies)


def test_a_compile_for_cpu_devices_says_nothing_of_the_memory(planning) -> None:
    # So an error about memory quotes the prediction, not what the host's compiler used.
    step = replace(program(10**8), target="cpu:8", argument_bytes=2**50)
    on_cpu = settling._judge(planning, planning.candidates[0], step, parse_target("cpu:8"))
    on_tpu = settling._judge(
        planning, planning.candidates[0], replace(step, target=str(TARGET)), TARGET
    )
    assert on_cpu.misfit == ""
    assert on_tpu.misfit == "it needs 1024.00 TiB"


def test_collectives_between_slices_take_the_network(planning) -> None:
    setup = make_setup("2x8", target="tpu:v5e:2x4:2")
    reduced = Collective(
        kind="all-reduce",
        axis="batch",
        n_bytes=2**30,
        dtype="bf16",
        group_size=2,
        layer="",
        phase="backward",
        overlapped=False,
        count=1,
        launches=1,
    )
    step = replace(program(10**8), target=str(setup.target), collectives=(reduced,))
    verdict = settling._judge(
        replace(planning, setup=setup), planning.candidates[0], step, setup.target
    )
    # 2 x 1 GiB x 1/2 through each device; the network of a v5e host carries far less than its ring.
    network = setup.target.chip.network_bytes_per_second
    assert network is not None
    assert verdict.step_seconds > 2**30 / network / 2 > step_time(step).step_seconds


def test_a_child_that_died_says_nothing_of_any(verdicts) -> None:
    def dead(request: CompileRequest) -> CompiledStep:
        raise ChildError("killed")

    with pytest.raises(ChildError, match="killed"):
        verdicts(dead, dead)


def test_a_child_that_dies_over_the_second_leaves_the_verdict_on_the_first(
    verdicts, ranked, in_order
) -> None:
    asked = []

    def dies(request: CompileRequest) -> CompiledStep:
        asked.append(request.rules)
        if request.rules == ranked[1]:
            raise ChildTimeoutError("no answer within 580 s")
        return in_order(request)

    found = verdicts(dies, in_order)
    assert names(found) == ["candidate 1", "candidate 2"]
    assert found[1].error == "no answer within 580 s"
    assert asked == ranked[:2]


def test_a_layout_that_only_compiles_shallow_is_no_winner(verdicts, ranked) -> None:
    def whole(request: CompileRequest) -> CompiledStep:
        if request.rules == ranked[0]:
            raise XlaError("no such program")
        return program(10**8)

    found = verdicts(lambda r: program((10 + ranked.index(r.rules)) * 10**7), whole)
    assert names(found) == ["candidate 2", "candidate 3", "candidate 1"]


def test_where_none_compiles_whole_nothing_is_verified(verdicts) -> None:
    def whole(request: CompileRequest) -> CompiledStep:
        raise XlaError("no such program")

    with pytest.raises(XlaError, match="no candidate runs on"):
        verdicts(lambda _: program(10**8), whole)


def test_no_rule_at_all_can_win_where_what_was_searched_for_disappoints(
    planned, compiled_by
) -> None:
    def compiler(request: CompileRequest) -> CompiledStep:
        return program(10**9 if request.rules else 10**6)

    compiled_by(compiler, compiler)
    first, *others = settle("gemma_2b_en", planned, TARGET)
    assert first.candidate is planned.no_rule and first.candidate.rules == ()
    assert planned.by_hand in [verdict.candidate for verdict in others]


def test_a_further_candidate_is_compiled_where_the_first_disappoint(planned, compiled_by) -> None:
    first = [candidate.rules for candidate in planned.candidates[:3]]
    fourth = planned.candidates[3]

    def compiler(request: CompileRequest) -> CompiledStep:
        return program(10**6 if request.rules == fourth.rules else 10**9)

    compiled_by(compiler, compiler)
    winner, *others = settle("gemma_2b_en", planned, TARGET)
    assert winner.candidate is fourth
    assert {verdict.candidate.rules for verdict in others} >= set(first)


def test_no_more_is_compiled_than_is_predicted_to_be_clearly_faster(planned, compiled_by) -> None:
    (best, *_) = planned.candidates
    as_predicted = round(best.step_seconds * TARGET.chip.clock_hz)
    compiled_by(lambda _: program(as_predicted), lambda _: program(as_predicted))
    assert len(settle("gemma_2b_en", planned, TARGET)) <= 4
