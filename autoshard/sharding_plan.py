"""`Plan`: a layout for a model on a mesh, with what was predicted and measured of it.

A plan is a value. It writes itself as JSON and as Python source, and makes the Keras objects that
put it to work. Reading one executes nothing.

The file holds, beside the fingerprint of the variable table, one line for each family of variables.
So a plan that is held against another model can name the first variable that differs, also where
the model cannot be built again from its name.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from autoshard.codec import dump, from_record, to_record
from autoshard.errors import (
    LayoutError,
    MeshError,
    ModelError,
    PlanFileError,
    UnknownNameError,
    UsageError,
)
from autoshard.files import write_whole
from autoshard.hardware.targets import check_devices, parse_target
from autoshard.layout.distribution import keras_layout_map
from autoshard.layout.reading import LayoutLike, LayoutText, open_layout
from autoshard.layout.resolve import resolve, rule_findings
from autoshard.layout.rules import LayoutRules, format_rules, match, rules_text
from autoshard.mesh import Mesh, check_batch, format_spec
from autoshard.model.build import build
from autoshard.model.keras_import import import_keras
from autoshard.model.variables import ModelTable
from autoshard.model.workload import Workload
from autoshard.records.parts import (
    Alternative,
    Compiled,
    PlannedModel,
    Prediction,
    Reason,
    Versions,
)

__all__ = ["GENERATE_GIVEN_UP", "Plan", "is_stream", "load", "plan_or_map"]

_FORMAT = "autoshard-plan"
_VERSION = 1

# What is said of a plan with `generate=False`.
GENERATE_GIVEN_UP = "made without regard to generate: generate may be slow or fail under this plan"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A layout for a model on a mesh.

    Attributes:
        model: what it was made for.
        mesh: the devices; Keras splits the data over its first axis.
        rules: the layout map.
        workload: the step whose cost was minimised.
        target: the chips, as `tpu:v5e:2x4`.
        generate: False where it was given up: `generate` may be slow or fail under the rules for
            layer outputs.
        fits: False where it does not keep the memory limit that it was made for.
        warnings: why it may not be what it seems, a line each.
        predicted: what the formulas say of the step.
        compiled: what a compiler says of it, None where none was asked.
        reasons: why each family got its spec.
        alternatives: the runners-up, those that were compiled first, each kind best first.
        versions: the packages that made it.
    """

    model: PlannedModel
    mesh: Mesh
    rules: LayoutRules = field(metadata={"key": "layout_map"})
    workload: Workload
    target: str
    generate: bool = field(default=True, metadata={"optional": True})
    fits: bool = field(default=True, metadata={"optional": True})
    warnings: tuple[str, ...] = field(default=(), metadata={"optional": True})
    predicted: Prediction
    compiled: Compiled | None = None
    reasons: tuple[Reason, ...] = ()
    alternatives: tuple[Alternative, ...] = ()
    versions: Versions = field(default_factory=Versions)

    def __post_init__(self) -> None:
        faults = [finding.message for finding in rule_findings(self.rules, self.mesh)]
        if faults:
            raise LayoutError.of(faults)

    @property
    def batch_dim_name(self) -> str:
        """The mesh axis over which Keras splits dimension 0 of the data."""
        return self.mesh.data_axis

    @property
    def stillness(self) -> str:
        """What of the weights the step does not move, in words; "" where it moves all."""
        trained = (family for family in self.model.families if family.trainable)
        rounds = any(family.dtype == "bfloat16" for family in trained)
        return self.workload.stillness if rounds else ""

    @property
    def notes(self) -> tuple[str, ...]:
        """What to know of the plan before it is used, a line each."""
        notes = (
            "" if self.fits else "does not fit the memory it was made for: the nearest layout",
            "" if self.generate else GENERATE_GIVEN_UP,
            self.stillness,
            *self.warnings,
        )
        # A file may hold any text, and a line of it is to stay a comment.
        return tuple(" ".join(note.split()) for note in notes if note)

    def to_json(self) -> str:
        """The text of the plan file: equal plans give equal bytes.

        Raises:
            PlanFileError: a predicted number is not finite.
        """
        record: dict[str, Any] = {"format": _FORMAT, "version": _VERSION}
        for key, value in to_record(self).items():
            record[key] = value
            if key == "mesh":
                record["batch_dim_name"] = self.batch_dim_name
        return dump(record) + "\n"

    @classmethod
    def from_json(cls, text: str, name: str = "the text") -> "Plan":
        """Read the text of a plan file.

        Args:
            text: what `to_json` wrote.
            name: what an error calls it.

        Raises:
            PlanFileError: it is no plan of this version; the text names the first wrong field.
        """
        try:
            return cls._from_record(json.loads(text))
        except PlanFileError as error:
            raise PlanFileError(f"{name} is not a plan that can be used: {error}") from None
        except (ValueError, RecursionError) as error:
            raise PlanFileError(f"{name} is not JSON: {error}") from None

    @classmethod
    def _from_record(cls, record: Any) -> "Plan":
        if not isinstance(record, dict) or record.get("format") != _FORMAT:
            raise PlanFileError(f"field 'format' is not \"{_FORMAT}\"")
        if record.get("version") != _VERSION:
            raise PlanFileError(
                f"field 'version' is {json.dumps(record.get('version'))}; this autoshard reads "
                f"version {_VERSION}"
            )
        head = ("format", "version", "batch_dim_name")
        plan: Plan = from_record(cls, {key: record[key] for key in record if key not in head})
        if record.get("batch_dim_name") != plan.batch_dim_name:
            raise PlanFileError(
                f"field 'batch_dim_name' is {json.dumps(record.get('batch_dim_name'))}; expected "
                f'the first axis of the mesh, "{plan.batch_dim_name}"'
            )
        try:
            check_batch(plan.workload.batch, plan.mesh)
        except MeshError as error:
            raise PlanFileError(f"field 'workload': {error}") from None
        try:
            check_devices(plan.mesh, parse_target(plan.target))
        except UsageError as error:
            raise PlanFileError(f"field 'target': {error}") from None
        return plan

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan file. Either the whole file is there afterwards or nothing has changed.

        What is no file, as a pipe or `/dev/stdout`, is written to.

        Raises:
            PlanFileError: it cannot be written.
        """
        path, text = Path(path), self.to_json()
        try:
            if os.fspath(path) == "/dev/stdout":
                print(text, end="", flush=True)
                return
            if is_stream(path):
                path.write_text(text, encoding="utf-8")
                return
            write_whole(path.resolve(), text)
        except OSError as error:
            raise PlanFileError(f"cannot write {path}: {error.strerror}") from None

    def __str__(self) -> str:
        """The map, behind a line that says what it is for."""
        head = f"{self.model.name} on {self.mesh}, {self.target}; {self.workload}"
        head += "" if self.generate else f"; {GENERATE_GIVEN_UP}"
        return f"{head}\n{rules_text(self.rules)}"

    def to_python(self) -> str:
        """Source that puts the plan to work as it is pasted, before the model is built."""
        notes = "".join(f"# {note}\n" for note in self.notes)
        return f"""\
import keras

# {json.dumps(self.model.name)} on {self.mesh.n_devices} devices, dtype {self.workload.policy}
{notes}device_mesh = keras.distribution.DeviceMesh(
    shape={self.mesh.shape},
    axis_names={format_spec(self.mesh.axis_names)},
    devices=keras.distribution.list_devices(),
)
layout_map = keras.distribution.LayoutMap(device_mesh)
{format_rules(self.rules)}
distribution = keras.distribution.ModelParallel(
    layout_map=layout_map, batch_dim_name="{self.batch_dim_name}"
)
keras.distribution.set_distribution(distribution)
"""

    def device_mesh(self, devices: Sequence[Any] | None = None) -> Any:
        """The plan's mesh as a `keras.distribution.DeviceMesh`.

        Args:
            devices: names or `jax.Device`s, one for each place of the mesh; by default all here.

        Raises:
            MeshError: there are more or fewer.
            BackendError: Keras runs on another backend than JAX.
        """
        keras = import_keras()
        given = keras.distribution.list_devices() if devices is None else list(devices)
        if len(given) != self.mesh.n_devices:
            where = "this process sees" if devices is None else "there were given"
            raise MeshError(
                f"the plan is for mesh {self.mesh}, {self.mesh.n_devices} devices, and {where} "
                f"{len(given)}; pass devices=[...] with {self.mesh.n_devices}, or plan for "
                f"{len(given)}"
            )
        return keras.distribution.DeviceMesh(
            shape=self.mesh.shape, axis_names=self.mesh.axis_names, devices=given
        )

    def layout_map(self, device_mesh: Any = None) -> Any:
        """The plan's rules as a `keras.distribution.LayoutMap`.

        Args:
            device_mesh: a `DeviceMesh` with the plan's shape and axis names; by default one of all
                devices of this machine.

        Raises:
            MeshError: the mesh is another, or the machine has another number of devices.
            BackendError: Keras runs on another backend than JAX.
        """
        if device_mesh is None:
            device_mesh = self.device_mesh()
        shape, names = tuple(device_mesh.shape), tuple(device_mesh.axis_names)
        if (shape, names) != (self.mesh.shape, self.mesh.axis_names):
            raise MeshError(
                f"the device mesh is {'x'.join(map(str, shape))} ({', '.join(names)}) and the plan "
                f"is for {self.mesh.named}; make that mesh, or plan "
                "for this one"
            )
        return keras_layout_map(self.rules, device_mesh)

    def distribution(self, devices: Sequence[Any] | None = None) -> Any:
        """The plan as a `keras.distribution.ModelParallel`, to be set before the model is built.

        Args:
            devices: names or `jax.Device`s, one for each place of the mesh; by default all here.

        Raises:
            MeshError: there are more or fewer.
            BackendError: Keras runs on another backend than JAX.
        """
        keras = import_keras()
        return keras.distribution.ModelParallel(
            layout_map=self.layout_map(self.device_mesh(devices)),
            batch_dim_name=self.batch_dim_name,
        )

    def partition_specs(self, model: Any = None) -> dict[str, Any]:
        """The layout of each variable, for code that uses JAX without Keras' distribution.

        Args:
            model: a `ModelTable`, or what `autoshard.plan` takes for a model; by default the model
                of the plan, built again from its name without weights.

        Returns:
            Variable path -> `jax.sharding.PartitionSpec`, an empty one where it is replicated.

        Raises:
            PlanFileError: the plan was made for another model.
            ModelError: the model cannot be built.
            UsageError: the model is made with another dtype than the plan's.
        """
        from jax.sharding import PartitionSpec

        table = model if isinstance(model, ModelTable) else self._build(model)
        self.check_model(table)
        paths = (*(variable.path for variable in table.variables), *table.state_paths)
        return {path: PartitionSpec(*(match(self.rules, path) or ())) for path in paths}

    def _build(self, model: Any) -> ModelTable:
        given = self.model.name if model is None else model
        # A name or a callable is built as the workload has it, a model stays as it is.
        made = isinstance(given, str) or not hasattr(given, "weights")
        asked: dict[str, Any] = {"dtype": self.workload.dtype, "lora_rank": self.workload.lora_rank}
        try:
            abstract = build(given, **asked) if made else build(given)
        except UnknownNameError:
            if model is not None:
                raise
            raise ModelError(
                f"the plan was made for the model '{self.model.name}', which no name finds again: "
                "pass the model"
            ) from None
        table: ModelTable = abstract.table()
        return table

    def other_model(self, table: ModelTable) -> str:
        """That it was made for another model than this, and how they differ; else ""."""
        if table.fingerprint == self.model.fingerprint:
            return ""
        return (
            f"the plan was made for {self.model.name}, and {table.name} differs from it: "
            f"{self.model.difference(table)}; plan for this model"
        )

    def check_model(self, table: ModelTable) -> None:
        """Make sure that the plan was made for this model, and that its rules find their layers.

        Raises:
            PlanFileError: it was not, and the text names the first variable that differs; or a rule
                takes nothing, as Keras numbers layers without a name over the whole process.
        """
        if told := self.other_model(table):
            raise PlanFileError(told)
        findings = resolve(self.rules, table).findings
        idle = next((one.rule for one in findings if one.kind == "takes-nothing"), None)
        if idle is not None:
            raise PlanFileError(
                f"rule '{idle}' takes nothing of {table.name}: Keras numbers layers without a name "
                "in the order in which a process makes them; name them, and plan again"
            )


def plan_or_map(layout: LayoutLike | Plan) -> Plan | LayoutLike:
    """A layout, its file read: the plan that it is, names or writes out, or else a map.

    Args:
        layout: a plan, the path of a plan file, its text, or a map as for `read_map`.

    Returns:
        The plan, or what `read_map` takes without opening a file again.

    Raises:
        UsageError: it is no layout, or there is no such file.
        PlanFileError: it cannot be read; or it is JSON, or named `.json`, and no plan.
    """
    if isinstance(layout, Plan):
        return layout
    opened = open_layout(layout)
    if isinstance(opened, LayoutText) and opened.is_json:
        return Plan.from_json(opened.text, opened.name)
    return opened


def is_stream(path: Path) -> bool:
    """Whether a path is no file to be replaced but one to write to, as a pipe or `/dev/stdout`."""
    if path.is_relative_to("/dev") and not path.is_relative_to("/dev/shm"):
        return True
    return os.path.exists(path) and not os.path.isfile(path)


def load(path: str | os.PathLike[str]) -> Plan:
    """Read a plan file.

    Raises:
        UsageError: there is none.
        PlanFileError: it cannot be read or is no plan; the text names the first wrong field.
    """
    try:
        # A `Path` of an empty name would be that of this folder.
        with open(os.fspath(path), encoding="utf-8-sig") as file:
            text = file.read()
    except FileNotFoundError:
        raise UsageError(f"there is no plan '{os.fspath(path)}'") from None
    except TypeError:
        raise UsageError(f"the plan is {path!r}; give the path of a plan file") from None
    except UnicodeDecodeError:
        raise PlanFileError(f"{os.fspath(path)} is not JSON: it is not UTF-8 text") from None
    except OSError as error:
        raise PlanFileError(f"{os.fspath(path)} cannot be read: {error.strerror}") from None
    return Plan.from_json(text, os.fspath(path))
