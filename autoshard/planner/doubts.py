"""Why a plan may not be what it seems, a line each."""

import re
from collections.abc import Iterator

from autoshard.layout.rules import LayoutRules, matching_rules
from autoshard.model.paths import layer_template, layer_templates
from autoshard.model.workload import OPTIMIZERS
from autoshard.planner.planning import Planning

__all__ = ["doubts"]

# Of all floating point operations; cutting pictures into patches takes a hundredth.
_MANY_CONVOLUTIONS = 0.1
# No process makes so many layers of a class.
_NO_NUMBER = 987_654_321


def doubts(
    planning: Planning, rules: LayoutRules, *, is_compiled: bool, is_best_shape: bool = False
) -> Iterator[str]:
    """What to doubt of a plan.

    Args:
        planning: what the planner found.
        rules: of the plan.
        is_compiled: whether a compiler was asked about it.
        is_best_shape: whether it comes before the plans for every other shape of the mesh.
    """
    yield from _made_up_names(planning, rules)
    if told := planning.traced.whole.open_sizes():
        yield told
    yield from _other_optimizer(planning)
    yield from _wide_weights(planning)
    yield from _nothing_trained(planning)
    yield from _nothing_split(planning, rules, is_best_shape)
    yield from _unknown_primitives(planning)
    yield from _loops(planning)
    if not is_compiled:
        yield from _trained_convolutions(planning)
    yield from _many_convolutions(planning)


def _made_up_names(planning: Planning, rules: LayoutRules) -> Iterator[str]:
    if numbered := sorted(_relied_upon(planning, rules)):
        yield (
            f"Keras made up {', '.join(numbered)}, and numbers such names as a process "
            "makes layers: name the layers, or another run may not find them"
        )


def _relied_upon(planning: Planning, rules: LayoutRules) -> set[str]:
    """The layers whose names Keras made up, and for which rules differ by their number."""
    table, made_up = planning.traced.table, planning.traced.whole.numbered_layers()
    return {
        name
        for path in (*(variable.path for variable in table.variables), *table.output_paths)
        for name in made_up.intersection(path.split("/"))
        for renamed in _renumbered(path, name)
        if matching_rules(rules, path) != matching_rules(rules, renamed)
    }


def _renumbered(path: str, name: str) -> Iterator[str]:
    """A path whose layer `name` has no number, or one that no process comes to."""
    stem = re.sub(r"_\d+$", "", name)
    for other in (stem, f"{stem}_{_NO_NUMBER}"):
        yield "/".join(other if one == name else one for one in path.split("/"))


def _other_optimizer(planning: Planning) -> Iterator[str]:
    workload, own = planning.setup.workload, planning.traced.whole.compiled_with
    if workload.trains and own not in ("", workload.optimizer):
        yield (
            f"the model is compiled with {own}, but planned for {workload.optimizer}: "
            "slots, memory and time may differ; an optimizer to plan for can be given, one of "
            f"{', '.join(OPTIMIZERS)}"
        )


def _wide_weights(planning: Planning) -> Iterator[str]:
    policy, traced = planning.setup.workload.policy, planning.traced
    if policy == "bfloat16" and traced.table.dtypes == ("float32",):
        yield (
            "the weights are float32, although the step is planned in bfloat16: that is how "
            f"{traced.folded.task} makes them whatever dtype it is given"
        )


def _nothing_trained(planning: Planning) -> Iterator[str]:
    table = planning.traced.table
    if planning.setup.workload.trains and not table.n_trainable:
        yield (
            f"no weight of {table.name} is trainable: a step of training computes no "
            "gradient and changes nothing"
        )


def _nothing_split(planning: Planning, rules: LayoutRules, is_best_shape: bool) -> Iterator[str]:
    mesh, batch = planning.setup.mesh, planning.setup.workload.batch
    n_devices = mesh.n_devices
    is_split = mesh.n_data > 1 or any(axis for rule in rules for axis in rule.spec)
    if is_split or n_devices == 1:
        return
    if batch % n_devices:
        advice = f"a data axis would split a batch of a multiple of {n_devices}"
    elif is_best_shape:
        advice = "the shapes of the mesh that split the batch rank behind"
    else:
        advice = f"ask for {n_devices} devices, not a mesh, to have others tried"
    yield f"nothing is split: each of the {n_devices} devices does all the work; {advice}"


def _unknown_primitives(planning: Planning) -> Iterator[str]:
    """Those without a rule."""
    if found := _with_layers(planning, "unknown"):
        yield (
            f"{'; '.join(found.values())}: how layouts pass through this is not known, so that "
            "it is taken to need whole operands: time and memory may be far from predicted"
        )


def _loops(planning: Planning) -> Iterator[str]:
    found = _with_layers(planning, "loop")
    found.pop("cond", None)
    if endless := found.pop("while", None):
        yield f"{endless}: how often this turns is not known, so that one turn is counted"
    if found:
        yield (
            f"{'; '.join(found.values())}: a loop is priced by its kernels and what it reads in "
            "each turn: time and memory may be several times what is predicted"
        )


def _with_layers(planning: Planning, kind: str) -> dict[str, str]:
    """The primitives of a kind -> each with the layers that have it."""
    templates = layer_templates(planning.traced.table.templates)
    found = {}
    for primitive, layers in planning.traced.program.layers_with(kind).items():
        named = dict.fromkeys(layer_template(layer, templates) for layer in layers if layer)
        found[primitive] = primitive + (f" in {', '.join(named)}" if named else "")
    return found


def _trained_convolutions(planning: Planning) -> Iterator[str]:
    mesh = planning.setup.mesh
    trains = any(op.is_convolution and op.backward for op in planning.traced.program.ops)
    if trains and mesh.n_devices > mesh.n_data:
        yield (
            "where devices hold copies XLA's partitioner may make gradients of convolutions "
            "too large: have the plan compiled for cpu, which tells"
        )


def _many_convolutions(planning: Planning) -> Iterator[str]:
    matmuls = [(op.flops * op.count, op.is_convolution) for op in planning.traced.program.ops]
    convolved = sum(flops for flops, is_convolution in matmuls if is_convolution)
    if convolved > _MANY_CONVOLUTIONS * sum(flops for flops, _ in matmuls):
        yield (
            "convolutions are priced as the matmuls they are made of: where channels are few, "
            "time and memory may be several times what is predicted"
        )
