"""What of a map's rules for layer outputs JAX refuses, and what does nothing."""

from collections.abc import Mapping

from autoshard.layout.resolve import FindingKind
from autoshard.layout.rules import LayoutRules, matching_rules
from autoshard.mesh import Mesh, Spec, divides, format_spec
from autoshard.model.outputs import OutputShapes
from autoshard.model.variables import ModelTable

__all__ = ["idle_rules", "refused_outputs"]


def refused_outputs(
    outputs: Mapping[str, Spec], table: ModelTable, mesh: Mesh, shapes: OutputShapes
) -> dict[str, tuple[FindingKind, str]]:
    """The layer outputs that JAX cannot lay out evenly as a map says, and why, each in one line.

    Args:
        outputs: path of a layer output -> its spec.
        table: the model's variables and layer outputs.
        mesh: the mesh.
        shapes: template of a layer output -> the shapes of the arrays there.

    Returns:
        Path -> what is wrong, and the reason; of equal blocks with one spec the first path.
    """
    first: dict[tuple[str, Spec], str] = {}
    for path, spec in outputs.items():
        first.setdefault((table.templates[path], spec), path)
    refused: dict[str, tuple[FindingKind, str]] = {}
    for (template, spec), path in first.items():
        for shape in shapes.get(template, ()):
            what = f"{format_spec(spec)} for '{template}', of shape {shape}"
            if len(spec) > len(shape):
                reason = f"JAX refuses {what}; give at most {len(shape)} entries"
                refused.setdefault(path, ("output-shape", reason))
            elif not divides(shape, spec, mesh):
                reason = f"JAX pads {what}, in a compiled call, and refuses it in another"
                refused.setdefault(path, ("uneven-output", reason))
    return refused


def idle_rules(
    rules: LayoutRules, outputs: Mapping[str, Spec], table: ModelTable, shapes: OutputShapes
) -> dict[str, str]:
    """The rules that take nothing but layer outputs which a step does not make.

    Args:
        rules: the map.
        outputs, table: as for `refused_outputs`.
        shapes: template of each layer output that the step makes -> shapes.

    Returns:
        Pattern -> that in one line.
    """
    working = {rule.pattern for v in table.variables for rule in matching_rules(rules, v.path)}
    idle: dict[str, str] = {}
    for path in outputs:
        template = table.templates[path]
        for rule in matching_rules(rules, path):
            idle.setdefault(rule.pattern, template)
            if template in shapes:
                working.add(rule.pattern)
    return {
        pattern: f"rule '{pattern}' does nothing here: '{template}' is no output of this step"
        for pattern, template in idle.items()
        if pattern not in working
    }
