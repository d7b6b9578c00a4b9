"""The environment in which a child process can compile for a target."""

import importlib.util
import os

from autoshard.errors import XlaError
from autoshard.hardware.targets import Target
from autoshard.installed import COMPILERS
from autoshard.model.keras_import import PLANNING_ONLY

__all__ = ["child_environment"]

# Kind of chip -> what of JAX brings its compiler.
_EXTRAS = {"tpu": "jax[tpu]", "gpu": "jax[cuda12]"}


def child_environment(target: Target) -> dict[str, str]:
    """The environment variables of a child that compiles for `target`.

    Raises:
        XlaError: the compiler of the target is not installed; the text has the pip command.
    """
    environment = {
        PLANNING_ONLY: "1",
        "KERAS_BACKEND": "jax",
        "JAX_PLATFORMS": "cpu",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    if target.chip.kind == "cpu":
        flags = os.environ.get("XLA_FLAGS", "")
        count = f"--xla_force_host_platform_device_count={target.n_devices}"
        return environment | {"XLA_FLAGS": f"{flags} {count}".strip()}
    kind = target.chip.kind
    if importlib.util.find_spec(COMPILERS[kind].replace("-", "_")) is None:
        advice = f'pip install "{_EXTRAS[kind]}"'
        raise XlaError(f"the {kind.upper()} compiler is not installed; {advice}")
    if kind == "gpu":
        return environment
    return environment | {
        # Without these libtpu asks the cloud's metadata server what it runs on, and a second
        # process aborts on the lock file of the first.
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
