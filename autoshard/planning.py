"""The planner's stages one after the other: trace, graph, search, rules. No compiler runs here."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from autoshard.cost.step import StepPricer
from autoshard.cost.strategies import Machine
from autoshard.errors import AutoshardError, LayoutError, MeshError, ModelError
from autoshard.graph.build import StepInput, build_program
from autoshard.graph.program import Program
from autoshard.hardware.links import axis_links
from autoshard.hardware.targets import Target, check_devices, default_target, parse_target
from autoshard.layout.reading import kerashub_rules
from autoshard.layout.references import ANNOUNCEMENT_MAP
from autoshard.layout.resolve import resolve
from autoshard.layout.rules import LayoutRules
from autoshard.layout.synthesis import synthesise
from autoshard.mesh import Mesh, Spec, parse_mesh
from autoshard.model.build import build
from autoshard.model.fold import fold
from autoshard.model.outputs import OutputShapes
from autoshard.model.recipe import AbstractModel
from autoshard.model.step import generate_shapes, make_step, trace
from autoshard.model.variables import ModelTable
from autoshard.model.workload import Workload
from autoshard.search.descent import Scored, Scorer
from autoshard.search.ranking import SearchResult, search
from autoshard.units import parse_bytes

__all__ = [
    "Candidate",
    "Planning",
    "Setup",
    "Stopwatch",
    "make_pricer",
    "make_setup",
    "run_planner",
    "score_rules",
]

_MATMUL_DTYPES = {"mixed_bfloat16": "bfloat16", "mixed_float16": "float16"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What is to be planned for.

    Attributes:
        mesh: the devices.
        target: the chips.
        workload: the step.
        memory_limit: bytes a device that the step may use.
        generate: whether `generate` has to run under the plan too, where the model has it.
    """

    mesh: Mesh
    target: Target
    workload: Workload
    memory_limit: int
    generate: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A layout in the running.

    Attributes:
        name: what a table calls it.
        rules: its layout map.
        scored: its assignment and cost; None where Keras refuses the map.
        failure: why Keras refuses it, in one line, or "".
    """

    name: str
    rules: LayoutRules
    scored: Scored | None
    failure: str = ""


@dataclass(slots=True)
class Stopwatch:
    """Seconds spent in each stage, measured."""

    seconds: dict[str, float] = field(default_factory=dict)
    progress: Callable[[str], None] = lambda stage: None

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time one stage and announce it."""
        self.progress(name)
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


@dataclass(frozen=True, slots=True, kw_only=True)
class Planning:
    """What the planner found.

    Attributes:
        setup: what it planned for.
        table: the variables of the model.
        task: class of the Keras model whose step was traced.
        unknown: primitives of the step that have no rule.
        result: the search.
        candidates: the best layouts that a LayoutMap can express, best first.
        rivals: maps that others published for this model.
        pricer: prices of the program, for more questions.
        without_generate: a better layout under which `generate` fails, or None.
    """

    setup: Setup
    table: ModelTable
    task: str
    unknown: tuple[str, ...]
    result: SearchResult
    candidates: tuple[Candidate, ...]
    rivals: tuple[Candidate, ...]
    pricer: StepPricer
    without_generate: Candidate | None = None


def make_setup(
    mesh: str | Mesh,
    *,
    axes: Sequence[str] | None = None,
    target: str | Target | None = None,
    workload: str = "train",
    batch: int | None = None,
    seq_len: int = 512,
    lora_rank: int | None = None,
    dtype: str = "bfloat16",
    optimizer: str = "adam",
    memory_limit: str | int | None = None,
    generate: bool = True,
) -> Setup:
    """Fill in the defaults and check that mesh, target and batch go together.

    Raises:
        MeshError: mesh and target differ in devices, or the data axis does not divide the batch.
        UsageError: a value is unknown or out of range.
    """
    if isinstance(mesh, str):
        mesh = parse_mesh(mesh, axes)
    if target is None:
        target = default_target(mesh)
    elif isinstance(target, str):
        target = parse_target(target)
    check_devices(mesh, target)
    n_data = mesh.sizes[mesh.data_axis]
    if batch is None:
        batch = -(-8 // n_data) * n_data
    if batch % n_data:
        raise MeshError(
            f"a batch of {batch} does not divide over the {n_data} devices of the data axis "
            f"'{mesh.data_axis}'; use a multiple of {n_data}"
        )
    if isinstance(memory_limit, str):
        memory_limit = parse_bytes(memory_limit)
    if workload == "lora" and lora_rank is None:
        lora_rank = 4
    return Setup(
        mesh=mesh,
        target=target,
        workload=Workload(
            kind=workload,  # type: ignore[arg-type]
            batch=batch,
            seq_len=seq_len,
            dtype=dtype,
            optimizer=optimizer,
            lora_rank=lora_rank,
        ),
        memory_limit=memory_limit or target.chip.hbm_bytes,
        generate=generate,
    )


def run_planner(
    model: Any, setup: Setup, *, top: int = 5, watch: Stopwatch | None = None
) -> Planning:
    """Plan a model.

    Args:
        model: what `autoshard.plan` takes.
        setup: mesh, target, workload, memory.
        top: how many layouts to keep.
        watch: measures the stages.
    """
    watch = watch or Stopwatch()
    with watch.stage("build the model"):
        whole = build(model, dtype=setup.workload.dtype, lora_rank=setup.workload.lora_rank)
        table = whole.table()
        # Two periods price exactly as more do: nothing but the count of what repeats differs.
        folded = fold(whole, periods=2)
    pricer = make_pricer(folded, setup, watch)
    with watch.stage("search"):
        rivals = tuple(_rivals(whole, table, setup, pricer))
        starts = [dict(rival.scored.assignment) for rival in rivals if rival.scored]
        shapes = _output_shapes(pricer.program)
        result = search(
            pricer,
            setup.mesh,
            setup.memory_limit,
            top=2 * top,
            starts=starts,
            outputs=_bounded(shapes, folded, setup),
            unbound_outputs=shapes if setup.generate and folded.generates else None,
        )
    with watch.stage("write the rules"):
        candidates = tuple(_expressible(table, result.ranked, top))
        unbound = [result.unbound] if result.unbound else []
        beyond = [replace(c, name="without generate") for c in _expressible(table, unbound, 1)]
    return Planning(
        setup=setup,
        table=table,
        task=folded.task,
        unknown=pricer.program.unknown,
        result=result,
        candidates=candidates,
        rivals=rivals,
        pricer=pricer,
        without_generate=beyond[0] if beyond else None,
    )


def make_pricer(folded: AbstractModel, setup: Setup, watch: Stopwatch | None = None) -> StepPricer:
    """What prices layouts of a model's step.

    Args:
        folded: the model, with fewer blocks.
        setup: mesh, target, workload.
        watch: measures the stages.
    """
    watch = watch or Stopwatch()
    with watch.stage("trace the step"):
        step = make_step(folded, setup.workload)
        closed = trace(step)
    with watch.stage("build the op graph"):
        program = _program(closed, step, folded)
        links = axis_links(setup.mesh, setup.target)
        dtype = setup.workload.dtype
        machine = Machine(
            chip=setup.target.chip,
            links=tuple(links[axis] for axis in setup.mesh.parallel_axes),
            matmul_dtype=_MATMUL_DTYPES.get(dtype, dtype),
        )
        return StepPricer(program, machine)


def _output_shapes(program: Program) -> OutputShapes:
    """The shapes at each template of a layer output in the step."""
    shapes = OutputShapes()
    for output in program.layer_outputs:
        shapes.setdefault(output.template, set()).add(output.shape)
    return shapes


def _bounded(shapes: OutputShapes, folded: AbstractModel, setup: Setup) -> OutputShapes:
    """With the shapes that the same outputs have in `generate`, where that has to run."""
    if not (setup.generate and folded.generates):
        return shapes
    try:
        generated = generate_shapes(folded, setup.workload)
    except ModelError:
        return OutputShapes()
    bounded = {template: set(found) for template, found in shapes.items()}
    templates = folded.table().templates
    for path, found in generated.items():
        bounded.setdefault(templates.get(path, path), set()).update(found)
    return bounded


def _program(closed: Any, step: Any, folded: AbstractModel) -> Program:
    """The op graph of the traced copy, each op and argument with its count in the real model."""
    folded_table = folded.table()
    variables = folded_table.variables
    family_of = {variable.path: variable.family for variable in variables}
    trainable = {variable.path for variable in variables if variable.trainable}
    multiplicity = folded.folding.multiplicity
    inputs = [
        StepInput(
            role=argument.role,
            family=family_of.get(argument.layout_path or ""),
            count=multiplicity(argument.layout_path or argument.path),
            trainable=argument.path in trainable and argument.role == "weight",
        )
        for argument in step.arguments
    ]
    replaces = [result.argument for result in step.results]
    return build_program(
        closed,
        inputs,
        replaces,
        lambda layer: _layer_count(layer, multiplicity),
        folded_table.templates,
    )


def _layer_count(layer: str, multiplicity: Callable[[str], int]) -> int:
    """A traced op names its layer from the outermost model down; blocks may start further in."""
    parts = layer.split("/")
    counts = (multiplicity("/".join(parts[start:])) for start in range(len(parts)))
    return next((count for count in counts if count != 1), 1)


def _rivals(
    model: AbstractModel, table: ModelTable, setup: Setup, pricer: StepPricer
) -> Iterator[Candidate]:
    """Maps that others published for this class of models, priced as they are."""
    scorer = Scorer(pricer=pricer, mesh=setup.mesh, memory_limit=setup.memory_limit)
    published: list[tuple[str, Callable[[], LayoutRules]]] = [
        ("KerasHub's own map", lambda: kerashub_rules(model.backbone, setup.mesh))
    ]
    if type(model.backbone).__name__ == "GemmaBackbone":
        published.append(("the announcement's map", lambda: ANNOUNCEMENT_MAP))
    for name, rules_of in published:
        try:
            rules = rules_of()
        except AutoshardError:
            continue
        yield score_rules(name, rules, table, setup.mesh, scorer)


def score_rules(
    name: str, rules: LayoutRules, table: ModelTable, mesh: Mesh, scorer: Scorer
) -> Candidate:
    """Price a map that somebody wrote.

    Args:
        name: what a table calls it.
        rules: the map.
        table: the model's variables.
        mesh: the mesh.
        scorer: prices assignments.
    """
    try:
        resolution = resolve(rules, table, mesh).checked()
    except LayoutError as error:
        return Candidate(name=name, rules=rules, scored=None, failure=str(error))
    outputs = {table.templates[path]: spec for path, spec in resolution.outputs.items()}
    assignment = _known({**resolution.assignment, **outputs}, scorer)
    return Candidate(name=name, rules=rules, scored=scorer.score(assignment))


def _known(assignment: Mapping[str, Spec], scorer: Scorer) -> dict[str, Spec]:
    """The part of an assignment that the step has arrays for."""
    program = scorer.pricer.program
    known = {argument.family for argument in program.arguments}
    known |= {output.template for output in program.layer_outputs}
    return {name: spec for name, spec in assignment.items() if name in known}


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
