"""A step lowered for a mesh of devices, under the real `keras.distribution.ModelParallel`.

The distribution is Keras' own, made from the rules, so what is compiled is what a user of the plan
gets: it answers for every weight by its path, a slot takes its owner's layout, data is split on the
data axis, and inside `distribution.scope()` Keras constrains the outputs of layers.

A decode cache's layout is left to the compiler, as in `generate`, where the cache is made inside
the compiled loop. Here it is an argument, which part of an axis could not split: such a step is
lowered for a mesh of prime axes (`autoshard.xla.prime_axes`).

Devices stand in the mesh in the order of `jax.devices()` or of the compile-only topology (host by
host, the first torus axis fastest), reshaped row by row, as `keras.distribution.DeviceMesh` does;
`jax.experimental.mesh_utils` would reorder them for some slices.
"""

from types import SimpleNamespace
from typing import Any

from autoshard.errors import LayoutError, XlaError
from autoshard.hardware.targets import Target, check_devices
from autoshard.layout.distribution import keras_distribution
from autoshard.layout.rules import LayoutRules
from autoshard.mesh import Mesh, format_spec
from autoshard.model.keras_import import import_keras
from autoshard.model.signature import Step, StepArgument
from autoshard.xla.prime_axes import by_prime_axes, prime_layout
from autoshard.xla.topology import topology_options

__all__ = ["lower", "target_devices"]


def target_devices(target: Target) -> tuple[Any, ...]:
    """The JAX devices of a target: virtual ones of this host, or compile-only ones of a slice.

    Raises:
        XlaError: this process has too few, or the target's compiler knows no such machine.
    """
    import jax
    from jax.experimental import topologies

    if target.chip.kind == "cpu":
        devices = jax.devices("cpu")
        if len(devices) < target.n_devices:
            raise XlaError(
                f"JAX shows {len(devices)} CPU devices and '{target}' needs {target.n_devices}: "
                f"set XLA_FLAGS=--xla_force_host_platform_device_count={target.n_devices} "
                "before JAX starts"
            )
        return tuple(devices[: target.n_devices])
    try:
        topology = topologies.get_topology_desc(**topology_options(target))
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        compiler = target.chip.kind.upper()
        raise XlaError(f"the {compiler} compiler does not know '{target}': {reason}") from error
    return tuple(topology.devices)


def lower(step: Step, rules: LayoutRules, mesh: Mesh, target: Target) -> tuple[Any, Any]:
    """Trace and lower a step for a target under the layout that `rules` give it.

    Args:
        step: the step, of an abstract model.
        rules: the layout map.
        mesh: as many devices as the target has.
        target: what to compile for.

    Returns:
        The `jax.stages.Lowered`, and the jaxpr that it was lowered from.

    Raises:
        LayoutError: a rule does not fit an argument's shape, or two rules match one path.
        MeshError: the mesh and the target have different numbers of devices.
    """
    import jax

    check_devices(mesh, target)
    has_cache = any(argument.role == "cache" for argument in step.arguments)
    layout_type = prime_layout() if has_cache else None
    distribution = keras_distribution(rules, mesh, target_devices(target), layout_type)
    shardings = [_sharding(distribution, argument) for argument in step.arguments]
    if has_cache:
        shardings = [sharding and by_prime_axes(sharding) for sharding in shardings]
    arguments = [
        jax.ShapeDtypeStruct(a.shape, jax.numpy.dtype(a.dtype), sharding=sharding)
        for a, sharding in zip(step.arguments, shardings, strict=True)
    ]
    results = tuple(None if r.argument is None else shardings[r.argument] for r in step.results)

    def function(*arrays: Any) -> tuple[Any, ...]:
        # JAX remembers the trace of a function, constraints of an earlier layout included: this
        # wrapper is a new one each time.
        return step.function(*arrays)

    function.__name__ = "step"
    with distribution.scope():
        jitted = jax.jit(function, out_shardings=results, donate_argnums=step.donated)
        traced = jitted.trace(*arguments)
        return traced.lower(), traced.jaxpr


def _sharding(distribution: Any, argument: StepArgument) -> Any:
    """The JAX sharding of an argument; None leaves it to the compiler."""
    if argument.role == "cache":
        return None
    if argument.role == "data":
        return _checked(distribution.get_data_layout(argument.shape), argument)
    if argument.layout_path is None:
        keras = import_keras()
        spec = [None] * len(argument.shape)
        layout = keras.distribution.TensorLayout(spec, distribution.device_mesh)
        return layout.backend_layout
    # Keras asks by the path and the rank alone.
    variable = SimpleNamespace(path=argument.layout_path, shape=argument.shape)
    try:
        layout = distribution.get_variable_layout(variable)
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise LayoutError(
            f"Keras refuses the layout of '{argument.layout_path}': {reason}"
        ) from error
    return _checked(layout, argument)


def _checked(layout: Any, argument: StepArgument) -> Any:
    sharding = layout.backend_layout
    written = f"'{argument.path}' of shape {argument.shape} cannot be laid out as " \
        f"{format_spec(tuple(layout.axes))}"  # fmt: skip
    if len(layout.axes) > len(argument.shape):
        raise LayoutError(f"{written}: it has {len(argument.shape)} dimensions")
    try:
        sharding.shard_shape(argument.shape)
    except ValueError as error:
        raise LayoutError(
            f"{written}: a split dimension must be a multiple of its mesh axis"
        ) from error
    return sharding
