"""How text names families: on one line those that a number alone tells apart."""

from collections.abc import Sequence

from autoshard.model.paths import unnumbered

__all__ = ["families_name"]


def families_name(names: Sequence[str], n_alike: int) -> str:
    """One name for families that one number tells apart.

    Args:
        names: of those that are meant.
        n_alike: how many of the kind there are in all.

    >>> families_name(["up_1/kernel"], 2), families_name(["up_1/kernel", "up_2/kernel"], 3)
    ('up_1/kernel', 'up_*/kernel (2 of 3)')
    """
    if len(names) == 1:
        return names[0]
    template = unnumbered(names[0])
    return template if len(names) == n_alike else f"{template} ({len(names)} of {n_alike})"
