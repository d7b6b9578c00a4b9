"""The fixed set of layouts of the fidelity benchmark: good, bad and random legal ones.

Made from the model's variables and a seed alone, so that no change of the planner changes it.
"""

import itertools
import math
import random
from collections.abc import Iterator, Mapping, Sequence

from maps import megatron_rules, rivals

from autoshard.errors import LayoutError
from autoshard.layout.resolve import resolve
from autoshard.layout.rules import LayoutRules
from autoshard.layout.synthesis import synthesise
from autoshard.mesh import Mesh, Spec, divides
from autoshard.model.recipe import AbstractModel
from autoshard.model.variables import Family, ModelTable

__all__ = ["N_LAYOUTS", "fixed_layouts", "legal_specs"]

N_LAYOUTS = 24
_N_NEAR = 7
_SEED = 2024
# A family with a smaller share of the model's bytes stays as it is.
_SMALL = 1e-3
_VOCABULARY = ("embeddings", "reverse_embeddings")
_LAST_LAYERS = ("attention_output", "ffw_linear", "feedforward_output_dense")

Assignment = dict[str, Spec]


def fixed_layouts(model: AbstractModel, mesh: Mesh) -> tuple[tuple[str, LayoutRules], ...]:
    """At least twenty layouts of a model on a mesh that Keras accepts, by name, all different.

    Args:
        model: the whole model, its class one of `maps.MEGATRON`.
        mesh: the data axis first.
    """
    found: dict[LayoutRules, str] = {}
    for name, rules in _candidates(model, mesh):
        if len(found) < N_LAYOUTS:
            found.setdefault(rules, name)
    return tuple((name, rules) for rules, name in found.items())


def legal_specs(shape: Sequence[int], mesh: Mesh) -> tuple[Spec, ...]:
    """Every spec that puts each mesh axis of several devices on one dimension or on none.

    >>> from autoshard.mesh import parse_mesh
    >>> legal_specs((16, 3), parse_mesh("1x8"))
    ((None, None), ('model', None))
    """
    specs = []
    for places in itertools.product(range(-1, len(shape)), repeat=len(mesh.parallel_axes)):
        axes = dict(zip(places, mesh.parallel_axes, strict=True))
        used = [place for place in places if place >= 0]
        spec = tuple(axes.get(dim) for dim in range(len(shape)))
        if len(set(used)) == len(used) and divides(shape, spec, mesh):
            specs.append(spec)
    return tuple(specs)


def _candidates(model: AbstractModel, mesh: Mesh) -> Iterator[tuple[str, LayoutRules]]:
    table = model.table()
    for name, rules in rivals(model, mesh):
        if not any(one.severity == "error" for one in resolve(rules, table, mesh).findings):
            yield name, rules
    hand = megatron_rules(type(model.backbone).__name__, table, mesh)
    megatron = dict(resolve(hand, table, mesh).assignment)
    yield from _outputs(table, megatron)
    rng = random.Random(_SEED)
    for name, assignment in _assignments(table, megatron, mesh, rng):
        try:
            yield name, synthesise(table, assignment)
        except LayoutError:
            continue


def _outputs(table: ModelTable, megatron: Assignment) -> Iterator[tuple[str, LayoutRules]]:
    """Megatron with a layout of activations: of the blocks' outputs, and of their last layers'."""
    outputs = {table.templates[path] for path in table.output_paths}
    blocks = {o for o in outputs if o.count("/") == 1 and o.endswith("_*/output")}
    last = {o for o in outputs if o.split("/")[-2] in _LAST_LAYERS}
    for name, chosen, spec in (
        ("megatron, sequence", blocks, ("batch", "model", None)),
        ("megatron, hidden", last, ("batch", None, "model")),
    ):
        yield name, synthesise(table, megatron, dict.fromkeys(sorted(chosen), spec))


def _assignments(
    table: ModelTable, megatron: Assignment, mesh: Mesh, rng: random.Random
) -> Iterator[tuple[str, Assignment]]:
    def only(keep: Mapping[str, bool]) -> Assignment:
        return {name: spec for name, spec in megatron.items() if keep[name]}

    names = [family.name for family in table.families()]
    vocabulary = {name: name.split("/")[-1] in _VOCABULARY for name in names}
    attention = {name: "attention" in name or "mha" in name for name in names}
    yield "replicated", {}
    yield "vocabulary whole", only({n: not vocabulary[n] for n in names})
    yield "vocabulary alone", only(vocabulary)
    yield "attention alone", only(attention)
    yield "feed-forward alone", only({n: not vocabulary[n] and not attention[n] for n in names})
    yield "other dimension", _other_dimension(table, megatron, mesh)
    if len(mesh.parallel_axes) > 1:
        yield "megatron, fsdp", _also_over_data(table, megatron, mesh)
        yield "fsdp", _also_over_data(table, {}, mesh)
    large = _large(table)
    for number in range(1, _N_NEAR + 1):
        changed = rng.sample(large, k=1 + number % 2)
        yield f"near {number}", megatron | _random(changed, mesh, rng)
    for number in range(1, 4 * N_LAYOUTS):
        yield f"random {number}", _random(large, mesh, rng)


def _large(table: ModelTable) -> list[Family]:
    families = table.families()
    floor = _SMALL * sum(family.n_bytes for family in families)
    return [family for family in families if family.n_bytes >= floor]


def _random(families: Sequence[Family], mesh: Mesh, rng: random.Random) -> Assignment:
    return {family.name: rng.choice(legal_specs(family.shape, mesh)) for family in families}


def _other_dimension(table: ModelTable, megatron: Assignment, mesh: Mesh) -> Assignment:
    """Every family over the largest dimension that Megatron leaves whole."""
    axis = mesh.axis_names[-1]
    found = {}
    for family in table.families():
        hand = megatron.get(family.name, ())
        if axis in hand:
            free = [
                (size, dim)
                for dim, size in enumerate(family.shape)
                if hand[dim] is None and size % mesh.sizes[axis] == 0
            ]
            if free:
                found[family.name] = _on(axis, max(free)[1], (None,) * len(family.shape))
    return found


def _also_over_data(table: ModelTable, base: Assignment, mesh: Mesh) -> Assignment:
    """Every matrix also over the data axis, along its largest dimension that is still whole."""
    found = dict(base)
    for family in table.families():
        spec = base.get(family.name, (None,) * len(family.shape))
        free = [
            (size, dim)
            for dim, size in enumerate(family.shape)
            if spec[dim] is None and size % mesh.sizes[mesh.data_axis] == 0
        ]
        if free and math.prod(family.shape) > max(family.shape):
            found[family.name] = _on(mesh.data_axis, max(free)[1], spec)
    return found


def _on(axis: str, dim: int, spec: Spec) -> Spec:
    return (*spec[:dim], axis, *spec[dim + 1 :])
