"""Candidates, and the prices of maps that others wrote or published."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from autoshard.cost.machine import Machine
from autoshard.cost.step import StepPricer
from autoshard.errors import AutoshardError, LayoutError
from autoshard.graph.axis_parts import AxisParts
from autoshard.graph.program import Program
from autoshard.layout.outputs import refused_outputs
from autoshard.layout.published import ANNOUNCEMENT_MAP
from autoshard.layout.reading import kerashub_rules
from autoshard.layout.resolve import resolve
from autoshard.layout.rules import LayoutRules
from autoshard.mesh import Spec
from autoshard.model.recipe import AbstractModel
from autoshard.model.variables import ModelTable
from autoshard.model.workload import QUANTIZED
from autoshard.planner.setup import Setup
from autoshard.search.descent import Scored, Scorer

__all__ = [
    "Candidate",
    "Refused",
    "make_scorer",
    "published_maps",
    "score_rules",
]

_MATMUL_DTYPES = {"mixed_bfloat16": "bfloat16", QUANTIZED: "bfloat16"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A layout in the running.

    Attributes:
        name: what a table calls it.
        rules: its layout map.
        scored: its assignment and cost.
    """

    name: str
    rules: LayoutRules
    scored: Scored

    @property
    def fits(self) -> bool:
        """Whether it keeps the memory limit, by the prediction."""
        return self.scored.excess_bytes == 0

    @property
    def step_seconds(self) -> float:
        """Predicted."""
        return self.scored.cost.step_seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """A map that has no price.

    Attributes:
        name: what a table calls it.
        rules: the map.
        failure: why Keras refuses it, or why it is not priced, in one line.
    """

    name: str
    rules: LayoutRules
    failure: str


def make_scorer(program: Program, setup: Setup) -> Scorer:
    """What scores layouts of a program on the mesh and chips of a setup, within its memory."""
    policy = setup.workload.policy
    machine = Machine.of(
        setup.mesh,
        setup.target,
        _MATMUL_DTYPES.get(policy, policy),
        AxisParts.of(program, [setup.mesh.sizes[axis] for axis in setup.mesh.parallel_axes]),
    )
    pricer = StepPricer(program, machine)
    return Scorer(pricer=pricer, mesh=setup.mesh, memory_limit=setup.memory_limit)


def published_maps(model: AbstractModel, scorer: Scorer) -> Iterator[Candidate | Refused]:
    """The maps that others published for this class of models, priced as they are.

    Args:
        model: the whole model.
        scorer: prices assignments.
    """
    table = model.table()
    published: list[tuple[str, Callable[[], LayoutRules]]] = [
        ("KerasHub's own map", lambda: kerashub_rules(model.backbone, scorer.mesh))
    ]
    if type(model.backbone).__name__ == "GemmaBackbone":
        published.append(("the announcement's map", lambda: ANNOUNCEMENT_MAP))
    for name, rules_of in published:
        try:
            rules = rules_of()
        except AutoshardError:
            continue
        yield score_rules(name, rules, table, scorer)


def score_rules(
    name: str, rules: LayoutRules, table: ModelTable, scorer: Scorer
) -> Candidate | Refused:
    """Price a map that somebody wrote.

    Args:
        name: what a table calls it.
        rules: the map.
        table: the model's variables.
        scorer: prices assignments.
    """
    try:
        resolution = resolve(rules, table, scorer.mesh).checked()
    except LayoutError as error:
        return Refused(name=name, rules=rules, failure=str(error))
    outputs = {table.templates[path]: spec for path, spec in resolution.outputs.items()}
    shapes = scorer.pricer.program.output_shapes()
    refused = refused_outputs(resolution.outputs, table, scorer.mesh, shapes)
    failure = _uneven(resolution.outputs, table)
    failure = failure or next((reason for _, reason in refused.values()), "")
    if failure:
        return Refused(name=name, rules=rules, failure=failure)
    assignment = _known({**resolution.assignment, **outputs}, scorer)
    return Candidate(name=name, rules=rules, scored=scorer.score(assignment))


def _uneven(outputs: Mapping[str, Spec], table: ModelTable) -> str:
    """Why rules that take the outputs of some blocks only are not priced, in one line, or ""."""
    laid: dict[str, set[Spec | None]] = {}
    for path in table.output_paths:
        laid.setdefault(table.templates[path], set()).add(outputs.get(path))
    for template, specs in laid.items():
        if len(specs) > 1:
            return f"not priced: it lays out '{template}' in some blocks otherwise than in others"
    return ""


def _known(assignment: Mapping[str, Spec], scorer: Scorer) -> dict[str, Spec]:
    """The part of an assignment that the step has arrays for."""
    program = scorer.pricer.program
    known = {argument.family for argument in program.arguments}
    known |= {output.template for output in program.layer_outputs}
    return {name: spec for name, spec in assignment.items() if name in known}
