"""Plans a traced model on one mesh: search, then rules. No compiler runs here."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from autoshard.errors import LayoutError, MeshError
from autoshard.layout.rules import LayoutRules
from autoshard.layout.synthesis import synthesise, tied_families
from autoshard.mesh import Mesh, Spec
from autoshard.model.outputs import OutputShapes, joined_shapes
from autoshard.model.recipe import AbstractModel
from autoshard.model.variables import ModelTable
from autoshard.planner.garbage import uncollected
from autoshard.planner.pricing import Candidate, Refused, make_scorer, published_maps
from autoshard.planner.setup import Setup
from autoshard.planner.stopwatch import Stopwatch
from autoshard.planner.tracing import TracedModel, shapes_in_generate
from autoshard.search.candidates import split_by_hand
from autoshard.search.descent import Scored, Scorer
from autoshard.search.ranking import SearchResult, search

__all__ = ["Planning", "run_planner"]

# Each further axis multiplies the layouts of every array.
_MOST_AXES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Planning:
    """What the planner found.

    Attributes:
        traced: the model and its step.
        setup: what it planned for.
        result: the search.
        candidates: the best layouts that a LayoutMap can express, best first.
        by_hand: what people write, told by shapes; a candidate where it is one, None where rules
            cannot tell it.
        plain: the best without rules for layer outputs; a candidate where it is one, None where
            rules cannot tell it.
        no_rule: every weight whole on every device, the data split; a candidate where it is one.
        rivals: maps that others published for this model.
        without_generate: a better layout under which `generate` is slow or fails, or None.
    """

    traced: TracedModel
    setup: Setup
    result: SearchResult
    candidates: tuple[Candidate, ...]
    rivals: tuple[Candidate | Refused, ...]
    by_hand: Candidate | None
    plain: Candidate | None
    no_rule: Candidate
    without_generate: Candidate | None

    @property
    def best(self) -> Scored:
        """The best layout that a LayoutMap can express, by the formulas."""
        return self.candidates[0].scored

    def cache_specs(self, scored: Scored) -> tuple[Spec, ...]:
        """How a layout lays out each array of a KV cache.

        Keras makes a cache inside the step, and XLA lays it out by propagation.
        """
        return tuple(_cache_specs(self.result.scorer, scored))


def run_planner(
    traced: TracedModel,
    setup: Setup,
    *,
    top: int = 5,
    without_generate: bool = True,
    watch: Stopwatch | None = None,
) -> Planning:
    """Plan a model on one mesh.

    Args:
        traced: the model, its step that of the setup.
        setup: mesh, target, workload, memory.
        top: how many layouts to keep.
        without_generate: whether to look for what breaks `generate` too, where that is to be kept.
            What is met on the way there counts for the rest of the search.
        watch: measures the stages.

    Raises:
        MeshError: the mesh has too many axes.
        LayoutError: rules can tell no layout.
    """
    _check(setup)
    watch = watch or Stopwatch()
    table = traced.table
    with watch.stage("search"), uncollected():
        rivals, result = _searched(traced, setup, 2 * top, without_generate)
    with watch.stage("write the rules"):
        candidates = tuple(_expressible(table, result.ranked, top))
        if not candidates:
            raise LayoutError(
                f"no layout found for {table.name} can be told by rules: variables of different "
                "families share a path; give their layers different names"
            )
        unbound = _named("without generate", table, result.unbound)
        by_hand = _by_hand(table, result, setup.mesh)
        plain = _named("no rule for outputs", table, result.plain)
        no_rule = Candidate(name="no rule", rules=(), scored=result.scorer.score({}))
        known = {candidate.rules: candidate for candidate in candidates}
    return Planning(
        traced=traced,
        setup=setup,
        result=result,
        candidates=candidates,
        rivals=rivals,
        by_hand=known.get(by_hand.rules, by_hand) if by_hand else None,
        plain=known.get(plain.rules, plain) if plain else None,
        no_rule=known.get((), no_rule),
        without_generate=unbound,
    )


def _check(setup: Setup) -> None:
    n_axes = len(setup.mesh.parallel_axes)
    if n_axes > _MOST_AXES:
        raise MeshError(
            f"mesh {setup.mesh} splits over {n_axes} axes; plans are made for up to {_MOST_AXES}"
        )


def _cache_specs(scorer: Scorer, scored: Scored) -> Iterator[Spec]:
    program, parts = scorer.pricer.program, scorer.pricer.machine.parts
    caches = [argument for argument in program.arguments if argument.role == "cache"]
    if not caches:
        return
    layouts = scorer.lay_out(dict(scored.assignment))
    for cache in caches:
        axis_of = parts.names(layouts[cache.group], scorer.mesh.parallel_axes)
        yield tuple(None if dim is None else axis_of.get(dim) for dim in cache.dims)


def _searched(
    traced: TracedModel, setup: Setup, top: int, without_generate: bool
) -> tuple[tuple[Candidate | Refused, ...], SearchResult]:
    """The maps that others published, and what a search finds that starts from these too."""
    scorer = make_scorer(traced.program, setup)
    rivals = tuple(published_maps(traced.whole, scorer))
    keeps_generate = setup.generate and traced.folded.generates
    shapes = traced.program.output_shapes()
    result = search(
        scorer.pricer,
        setup.mesh,
        setup.memory_limit,
        top=top,
        starts=[dict(rival.scored.assignment) for rival in rivals if isinstance(rival, Candidate)],
        outputs=_bounded(shapes, traced.folded, setup) if keeps_generate else shapes,
        unbound_outputs=shapes if without_generate and keeps_generate else None,
        tied=tied_families(traced.table),
    )
    return rivals, result


def _bounded(shapes: OutputShapes, folded: AbstractModel, setup: Setup) -> OutputShapes:
    """With the shapes that the same outputs have in `generate`."""
    generated = shapes_in_generate(folded, setup.workload, setup.target.chip)
    if generated is None:
        return OutputShapes()
    return joined_shapes(shapes, generated)


def _by_hand(table: ModelTable, result: SearchResult, mesh: Mesh) -> Candidate | None:
    weights = [choices for choices in result.choices if not choices.is_output]
    split = result.scorer.score(split_by_hand(weights, mesh))
    return _named("split by hand", table, split)


def _named(name: str, table: ModelTable, scored: Scored | None) -> Candidate | None:
    """A layout that is no candidate, if there is one and rules can tell it."""
    found = _expressible(table, [scored] if scored else [], top=1)
    return next((replace(candidate, name=name) for candidate in found), None)


def _expressible(table: ModelTable, ranked: Sequence[Scored], top: int) -> Iterator[Candidate]:
    """The layouts that rules can tell apart, at most `top`, with distinct rules."""
    seen: set[LayoutRules] = set()
    families = {family.name for family in table.families()}
    for scored in ranked:
        assignment = {name: spec for name, spec in scored.assignment if name in families}
        outputs = {name: spec for name, spec in scored.assignment if name not in families}
        try:
            rules = synthesise(table, assignment, outputs)
        except LayoutError:
            continue
        if rules not in seen:
            seen.add(rules)
            yield Candidate(name=f"candidate {len(seen)}", rules=rules, scored=scored)
        if len(seen) == top:
            return
