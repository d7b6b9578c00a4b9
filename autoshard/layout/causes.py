"""Which rule brings a collective about.

A collective that the compiler attributes to a layer runs because that layer's weights or outputs
are split over its mesh axis, so its cause is the one rule that splits them so. Where several rules
do, or none, it cannot be told, except that what runs over the data axis alone comes from splitting
the data: the sum of gradients over the batch.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from autoshard.layout.rules import LayoutRules, matching_rules
from autoshard.mesh import Mesh
from autoshard.model.paths import block_pattern

__all__ = ["DATA_SPLIT", "Causes"]

# The cause of what no rule brings about: the batch lies over the data axis.
DATA_SPLIT = "the split of the data"


@dataclass(frozen=True, slots=True, kw_only=True)
class Causes:
    """The rules of a map, and what they act on.

    Attributes:
        rules: the map.
        mesh: the mesh; its first axis splits the data.
        paths: every variable and every layer output that Keras asks the map for.
    """

    rules: LayoutRules
    mesh: Mesh
    paths: Sequence[str]

    def of(self, layer: str, axis: str) -> str | None:
        """The cause of a collective.

        Args:
            layer: the layer that it serves, with `*` for a block's index; empty for none.
            axis: the mesh axes it runs over, joined by commas.

        Returns:
            The pattern of a rule, `the split of the data`, or None.
        """
        axes = set(axis.split(","))
        split = {
            rule.pattern
            for path in self._under(layer)
            for rule in matching_rules(self.rules, path)
            if axes & set(rule.spec)
        }
        if len(split) == 1:
            return split.pop()
        if not split and axes == {self.mesh.data_axis}:
            return DATA_SPLIT
        return None

    def _under(self, layer: str) -> list[str]:
        """The layer's own variables and output; those of the layers inside it where it has none."""
        if not layer:
            return []
        start = block_pattern(layer)
        own = re.compile(rf"(?:.+/)?{start}/[^/]+")
        inside = re.compile(rf"(?:.+/)?{start}/.+")
        found = [path for path in self.paths if own.fullmatch(path)]
        weights = [path for path in found if not path.endswith("/output")]
        return found if weights else [path for path in self.paths if inside.fullmatch(path)]
