"""The child's side of a run: build the model with values, do one part, say what came of it.

The calls are Keras' own: `predict` and `fit` of `keras.Model` (a KerasHub task's insist on a
preprocessor), `generate` of the task. Where several processes share the devices no process holds a
whole result, and Keras' `predict` and `generate` fail when they copy it; there the compiled
functions behind them are called, and their results gathered.
"""

import contextlib
import hashlib
import re
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from autoshard.errors import ModelError, XlaError
from autoshard.execution.checkpointing import checkpoint_blocks
from autoshard.execution.placement import placed_by
from autoshard.execution.requests import PartOutcome, RunRequest
from autoshard.layout.distribution import keras_distribution
from autoshard.model.build import build_for
from autoshard.model.data import prompt_data, run_data, targets_of, token_name
from autoshard.model.fold import fold
from autoshard.model.keras_import import import_keras, without_tensorflow
from autoshard.model.recipe import AbstractModel
from autoshard.model.values import with_stored_values, with_values

__all__ = ["run_part"]

Arrays = dict[str, Any]

# For Adam where Keras' default rounds to 1: in bfloat16 this is 0.988.
_BETA_2 = 0.99


def run_part(request: RunRequest, progress: Callable[[str], None]) -> PartOutcome:
    """Build a model with values and run one part.

    Args:
        request: what to run; the process has as many devices as its mesh, or its share of them.
        progress: is told the stages `join the other processes`, `build` and the part.

    Raises:
        ModelError: the model cannot be built, or does not generate.
        XlaError: there are too few devices, or a result is not finite.
    """
    # Keras looks for TensorFlow whenever it seeds or takes data.
    with without_tensorflow():
        return _run(request, progress)


def _run(request: RunRequest, progress: Callable[[str], None]) -> PartOutcome:
    keras = import_keras()
    if request.cluster is not None:
        progress("join the other processes")
        keras.utils.set_random_seed(request.seed)
        keras.distribution.initialize(
            request.cluster.address, request.cluster.n_processes, request.cluster.process_id
        )
    progress("build")
    workload = request.workload
    whole = build_for(request.model, workload)
    described = fold(whole, periods=request.periods)
    distribution = _distribution(request)
    with distribution.scope() if distribution else contextlib.nullcontext():
        start = time.monotonic()
        with_any = with_stored_values if request.part == "load" else with_values
        model = with_any(described, request.seed)
        built, built_bytes = time.monotonic(), _peak_bytes()
        progress(request.part)
        arrays, loss = _PARTS[request.part](model, request, distribution)
        ended = time.monotonic()
        placed = None
        if distribution is not None:
            placed = placed_by(model.model, request.rules, distribution.device_mesh)
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise XlaError(f"{request.part} of {request.model}: {name} is not finite")
        if name.startswith("output") and not array.any():
            raise XlaError(
                f"{request.part} of {request.model}: {name} is 0 throughout, and nothing can be "
                "compared"
            )
    return PartOutcome(
        build_seconds=built - start,
        run_seconds=ended - built,
        built_bytes=built_bytes,
        peak_bytes=_peak_bytes(),
        placed=placed,
        arrays=arrays,
        loss=loss,
    )


def _distribution(request: RunRequest) -> Any:
    if request.mesh is None:
        return None
    import jax

    devices = jax.devices("cpu")
    if len(devices) != request.mesh.n_devices:
        raise XlaError(
            f"JAX shows {len(devices)} CPU devices and mesh {request.mesh} has "
            f"{request.mesh.n_devices}"
        )
    return keras_distribution(request.rules, request.mesh, devices)


def _load(model: AbstractModel, request: RunRequest, distribution: Any) -> tuple[Arrays, str]:
    digests = [_digest(weight.value) for weight in model.model.weights]
    return {"digests": np.stack(digests)}, ""


def _digest(value: Any) -> Any:
    whole = np.ascontiguousarray(_whole(value)).reshape(-1).view("uint8")
    return np.frombuffer(hashlib.sha256(whole.data).digest(), "uint8")


def _predict(model: AbstractModel, request: RunRequest, distribution: Any) -> tuple[Arrays, str]:
    data = run_data(model, request.workload, request.seed)
    return _named(_outputs(model, data, request, distribution)), ""


def _generate(model: AbstractModel, request: RunRequest, distribution: Any) -> tuple[Arrays, str]:
    if not model.generates:
        raise ModelError(f"{model.task} does not generate")
    task, workload = model.model, request.workload
    prompt = prompt_data(model, workload, request.n_prompt, request.seed)
    task.compile(sampler="greedy")
    if request.cluster is None:
        made = task.generate(prompt, stop_token_ids=None)
    else:
        made = task.make_generate_function()(_distributed(prompt, distribution), None)
    name = token_name(made)
    tokens = _whole(made[name])
    if not request.with_margins:
        return {"tokens": tokens}, ""
    data = run_data(model, workload, request.seed) | {name: tokens}
    logits = _named(_outputs(model, data, request, distribution))["output"]
    highest = np.partition(logits[:, :-1], -2, axis=-1)[..., -2:]
    return {
        "tokens": tokens,
        "margins": highest[..., 1] - highest[..., 0],
        "root_mean_square": np.sqrt(np.mean(np.square(logits))),
        "largest": np.abs(logits).max(),
    }, ""


def _fit(model: AbstractModel, request: RunRequest, distribution: Any) -> tuple[Arrays, str]:
    keras = import_keras()
    workload = request.workload
    data = run_data(model, workload, request.seed)
    targets = targets_of(model, data, request.seed)
    checkpoint_blocks(model, data)
    # A KerasHub task's own `compile` would add metrics.
    optimizer = keras.optimizers.get(workload.optimizer)
    dtypes = {str(weight.dtype) for weight in model.model.trainable_weights}
    is_still = workload.is_still and "bfloat16" in dtypes
    if is_still:
        optimizer.beta_2 = _BETA_2
    model.model.compile(optimizer=optimizer, loss=targets.loss, weighted_metrics=[])
    history = keras.Model.fit(
        model.model,
        data,
        targets.values,
        batch_size=workload.batch,
        epochs=request.n_steps,
        shuffle=False,
        verbose=0,
    )
    words = f"beta_2 = {_BETA_2} for the default is 1 in bfloat16, " if is_still else ""
    losses = np.asarray(history.history["loss"])
    return {"losses": losses, "slots": _slots(optimizer)}, words + targets.words


def _slots(optimizer: Any) -> Any:
    """Root mean square of each of an optimizer's slots `[slots]`, in the optimizer's order."""
    import jax
    import jax.numpy as jnp

    def root_mean_square(value: Any) -> Any:
        return jnp.sqrt(jnp.mean(jnp.square(value.astype("float32"))))

    measured = jax.jit(root_mean_square)
    slots = (variable.value for variable in optimizer.variables if variable.shape)
    return np.array([float(measured(value)) for value in slots])


_PARTS: dict[str, Callable[[AbstractModel, RunRequest, Any], tuple[Arrays, str]]] = {
    "load": _load,
    "predict": _predict,
    "generate": _generate,
    "fit": _fit,
}


def _outputs(model: AbstractModel, data: Any, request: RunRequest, distribution: Any) -> Any:
    """The outputs of `predict`."""
    keras, task = import_keras(), model.model
    if request.cluster is None:
        return keras.Model.predict(task, data, batch_size=request.workload.batch, verbose=0)
    task.make_predict_function()
    state = task._get_jax_state(trainable_variables=True, non_trainable_variables=True)
    outputs, _ = task.predict_function(state, iter([(_distributed(data, distribution),)]))
    return outputs


def _distributed(data: Any, distribution: Any) -> Any:
    """Data laid out over all processes, each of which holds the whole of it."""
    import jax

    def laid_out(array: Any) -> Any:
        layout = distribution.get_data_layout(array.shape).backend_layout
        return jax.make_array_from_callback(array.shape, layout, lambda index: array[index])

    return import_keras().tree.map_structure(laid_out, data)


def _named(outputs: Any) -> Arrays:
    """Outputs by name, as float32."""
    flat = import_keras().tree.flatten_with_path(outputs)
    return {
        "/".join(("output", *map(str, path))): _whole(array).astype("float32")
        for path, array in flat
    }


def _whole(array: Any) -> Any:
    """A whole array as numpy's, also where other processes hold parts of it."""
    if getattr(array, "is_fully_addressable", True):
        return np.asarray(array)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def _peak_bytes() -> int:
    """The most resident memory of this process so far."""
    with contextlib.suppress(OSError):
        # What `getrusage` says on Linux may be the peak of the process that started this one.
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        if found := re.search(r"^VmHWM:\s*(\d+) kB$", status, re.MULTILINE):
            return int(found[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
