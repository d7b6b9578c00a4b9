"""How many rules of a map have to pay for their lines.

A map needs a rule for each weight that matters; these are free. Counted are those that a person
would leave out but for a gain:

- a rule for layer outputs, or for small biases;
- one more for each further spec among layers that numbers alone tell apart (`up_0`, `up_1`, ...):
  one pattern no longer names them all.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from autoshard.mesh import Spec
from autoshard.search.candidates import NO_RULE, Choices

__all__ = ["RuleCount"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RuleCount:
    """What is counted, of a number of families and layer outputs.

    Attributes:
        optional: layer output, or small bias -> the rule that it shares with others.
        numbered: groups of two and more names that differ in numbers alone.
    """

    optional: Mapping[str, str]
    numbered: tuple[tuple[str, ...], ...]

    @classmethod
    def of(cls, families: Iterable[Choices]) -> "RuleCount":
        """The count for what there is to choose."""
        optional: dict[str, str] = {}
        numbered: dict[tuple[str, tuple[int, ...]], list[str]] = {}
        for choices in families:
            if choices.is_output:
                optional[choices.name] = choices.unnumbered
            elif choices.follows:
                optional[choices.name] = choices.siblings
            if len(choices.specs) > 1:
                numbered.setdefault((choices.unnumbered, choices.shape), []).append(choices.name)
        several = (tuple(names) for names in numbered.values() if len(names) > 1)
        return cls(optional=optional, numbered=tuple(several))

    def __call__(self, assignment: Mapping[str, Spec]) -> int:
        """The rules of an assignment that have to pay.

        Args:
            assignment: family, or template of a layer output -> spec.
        """
        split = (name for name, spec in assignment.items() if any(spec))
        laid = {self.optional[name] for name in split if name in self.optional}
        specs = ({assignment.get(name, NO_RULE) for name in group} for group in self.numbered)
        return len(laid) + sum(len(group) - 1 for group in specs)
