"""Finds the `keras.distribution.LayoutMap` that runs a Keras model fastest on a device mesh.

The names below are loaded when they are first used, so that `import autoshard` and
`autoshard --help` load neither keras nor jax.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from autoshard.checking import check
    from autoshard.comparison import compare
    from autoshard.errors import (
        AutoshardError,
        BackendError,
        LayoutError,
        MeshError,
        ModelError,
        NothingFitsError,
        PlanFileError,
        UnknownNameError,
        UsageError,
        XlaError,
    )
    from autoshard.execution.running import run
    from autoshard.mesh import Mesh
    from autoshard.model.loading import sharded_loading
    from autoshard.pipeline import inspect, plan
    from autoshard.sharding_plan import Plan, load
    from autoshard.verification import verify

__all__ = [
    "AutoshardError",
    "BackendError",
    "LayoutError",
    "Mesh",
    "MeshError",
    "ModelError",
    "NothingFitsError",
    "Plan",
    "PlanFileError",
    "UnknownNameError",
    "UsageError",
    "XlaError",
    "__version__",
    "check",
    "compare",
    "inspect",
    "load",
    "plan",
    "run",
    "sharded_loading",
    "verify",
]

__version__ = "0.1.0"

_HOME = {
    "AutoshardError": "autoshard.errors",
    "BackendError": "autoshard.errors",
    "LayoutError": "autoshard.errors",
    "Mesh": "autoshard.mesh",
    "MeshError": "autoshard.errors",
    "ModelError": "autoshard.errors",
    "NothingFitsError": "autoshard.errors",
    "Plan": "autoshard.sharding_plan",
    "PlanFileError": "autoshard.errors",
    "UnknownNameError": "autoshard.errors",
    "UsageError": "autoshard.errors",
    "XlaError": "autoshard.errors",
    "check": "autoshard.checking",
    "compare": "autoshard.comparison",
    "inspect": "autoshard.pipeline",
    "load": "autoshard.sharding_plan",
    "plan": "autoshard.pipeline",
    "run": "autoshard.execution.running",
    "sharded_loading": "autoshard.model.loading",
    "verify": "autoshard.verification",
}


def __getattr__(name: str) -> object:
    """Load a public name from its module on first use (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module 'autoshard' has no attribute '{name}'")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
