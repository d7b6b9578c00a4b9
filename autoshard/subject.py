"""What is verified, by a compiler or by a run: a model, its layout, the devices and the step."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from autoshard.errors import UsageError
from autoshard.hardware.targets import parse_target
from autoshard.layout.reading import is_text, read_map
from autoshard.layout.resolve import resolve
from autoshard.layout.rules import LayoutRules
from autoshard.model.build import build_for
from autoshard.model.recipe import AbstractModel
from autoshard.planner.setup import Setup, limit_bytes, make_setup, named_target
from autoshard.records.parts import Prediction
from autoshard.sharding_plan import Plan, plan_or_map

__all__ = ["Subject", "subject_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What is verified.

    Attributes:
        name: by which a child builds the model.
        model: the model, without values.
        rules: the layout map.
        setup: mesh, target, workload, memory.
        attention: the chip whose attention the step takes: that of the plan, or of the target.
        predicted: what the plan says of its own target, where the setup has that, or CPU devices,
            whose program has the same collectives but for what a chip's compiler makes of them.
    """

    name: str
    model: AbstractModel
    rules: LayoutRules
    setup: Setup
    attention: str
    predicted: Prediction | None


def subject_of(
    layout: Any,
    *,
    model: str | os.PathLike[str] | None = None,
    target: str | None = None,
    memory_limit: str | int | None = None,
    **options: Any,
) -> Subject:
    """Read what is to be verified.

    Args:
        layout, model, target, memory_limit, **options: as for `autoshard.verify`.

    Raises:
        UsageError: a value is wrong, or a plan came with the options of a map.
        PlanFileError: the plan was made for another model.
        LayoutError: Keras refuses the map.
    """
    given = {name: value for name, value in options.items() if value is not None}
    made = plan_or_map(layout)
    plan = made if isinstance(made, Plan) else None
    if model is None:
        if plan is None:
            is_given = isinstance(layout, Mapping) or is_text(layout)
            raise UsageError(
                f"{'the map' if is_given else layout} is no plan: name its model and its mesh"
            )
        if given:
            raise UsageError(
                f"a plan states its own {', '.join(sorted(given)).replace('_', ' ')}; leave that "
                "out, or name the model whose layout this is"
            )
        return _planned(plan, target, memory_limit)
    if isinstance(model, os.PathLike):
        model = os.fspath(model)
    if not isinstance(model, str):
        raise UsageError("the compiler's process builds the model itself: pass its name")
    if "mesh" not in given:
        raise UsageError(
            "a plan states its own model and mesh: leave the model out, or name a mesh too"
            if plan
            else "a layout that is no plan needs its mesh, such as 1x8"
        )
    setup = make_setup(**given, target=target, memory_limit=memory_limit)
    workload = setup.workload
    built = build_for(model, workload)
    generate = plan.generate if plan else setup.generate
    setup = replace(setup, workload=built.adapted(workload), generate=generate)
    if isinstance(made, Plan):
        rules = made.rules
    else:
        rules = read_map(made, built.backbone, setup.mesh).accepted()
    resolve(rules, built.table(), setup.mesh).accepted()
    return Subject(
        name=model,
        model=built,
        rules=rules,
        setup=setup,
        attention=setup.target.chip.name,
        predicted=None,
    )


def _planned(plan: Plan, target: str | None, memory_limit: str | int | None) -> Subject:
    workload = plan.workload
    own = parse_target(plan.target)
    asked = own if target is None else named_target(target, plan.mesh.n_devices)
    setup = Setup(
        mesh=plan.mesh,
        target=asked,
        workload=workload,
        memory_limit=limit_bytes(memory_limit, asked),
        generate=plan.generate,
    )
    built = build_for(plan.model.name, workload)
    plan.check_model(built.table())
    on_cpu = asked.chip.kind == "cpu"
    return Subject(
        name=plan.model.name,
        model=built,
        rules=plan.rules,
        setup=setup,
        attention=(own if on_cpu else asked).chip.name,
        predicted=plan.predicted if on_cpu or asked == own else None,
    )
