"""How many rules of a map have to pay for their lines.

A map needs a rule for each weight that matters; these are free. Counted are what a person would
leave out but for a gain:

- the rules for layer outputs and for small biases;
- the numbers in patterns: of layers that one number tells apart (`up_0`, `up_1`, ...) all those
  that do not lie as most of them do. One pattern names them all only where they lie alike.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from autoshard.mesh import Spec
from autoshard.search.candidates import NO_RULE, Choices

__all__ = ["RuleCount"]

Names = tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RuleCount:
    """What is counted, of a number of families and layer outputs.

    Attributes:
        weights: groups of two and more families that differ in one number alone.
        outputs: groups of layer outputs that do, one and more in each.
        biases: sibling groups of small biases.
    """

    weights: tuple[Names, ...]
    outputs: tuple[Names, ...]
    biases: tuple[Names, ...]

    @classmethod
    def of(cls, families: Iterable[Choices]) -> "RuleCount":
        """The count for what there is to choose."""
        weights: dict[tuple[str, tuple[int, ...]], list[str]] = {}
        outputs: dict[tuple[str, tuple[int, ...]], list[str]] = {}
        biases: dict[str, list[str]] = {}
        for choices in families:
            if len(choices.specs) > 1:
                alike = outputs if choices.is_output else weights
                alike.setdefault((choices.unnumbered, choices.shape), []).append(choices.name)
                if choices.follows:
                    biases.setdefault(choices.siblings, []).append(choices.name)
        return cls(
            weights=tuple(tuple(names) for names in weights.values() if len(names) > 1),
            outputs=tuple(tuple(names) for names in outputs.values()),
            biases=tuple(tuple(names) for names in biases.values()),
        )

    def __call__(self, assignment: Mapping[str, Spec]) -> int:
        """The rules of an assignment that have to pay.

        Args:
            assignment: family, or template of a layer output -> spec.
        """
        n_rules = 0
        for names in self.weights:
            specs = Counter(assignment.get(name, NO_RULE) for name in names)
            n_rules += len(names) - max(specs.values())
        for names in self.outputs:
            specs = Counter(assignment.get(name, NO_RULE) for name in names)
            n_laid = len(names) - specs[NO_RULE]
            n_rules += 1 if n_laid and len(specs) == 1 else n_laid
        for names in self.biases:
            n_rules += any(any(assignment.get(name, NO_RULE)) for name in names)
        return n_rules
