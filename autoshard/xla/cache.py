"""Compiled verdicts on disk, so that `verify` asks no compiler the same question twice.

A verdict is a program's summary or the sentence by which the compiler refused it for its memory.
Its key is a hash of all that decides it: the model (its table of variables and its configuration),
the layout rules, mesh, workload, target and depth, the versions of the packages, this package's own
source, and what the environment tells JAX, Keras and XLA. A model whose code is not KerasHub's has
no key: its code may change where neither table nor configuration shows it.

Entries are written whole or not at all, and one that cannot be read is as good as none.
"""

import contextlib
import hashlib
import json
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from platformdirs import user_cache_dir

from autoshard.codec import from_record, to_record
from autoshard.errors import AutoshardError, OutOfMemoryError
from autoshard.files import write_whole
from autoshard.installed import COMPILERS, installed_version
from autoshard.model.recipe import AbstractModel
from autoshard.xla.compiled import CompiledStep, CompileRequest

__all__ = ["VerdictCache", "verdict_cache"]

_PACKAGES = ("keras", "keras-hub", "jax", *COMPILERS.values())
_SETTINGS = ("JAX_", "KERAS_", "LIBTPU_", "XLA_")
_FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class VerdictCache:
    """The verdicts on one model.

    Attributes:
        folder: where the entries lie.
        model_key: what stands for the model.
        reads: whether it tells what it keeps; otherwise the compiler is asked again.
    """

    folder: Path
    model_key: str
    reads: bool = True

    def get(self, request: CompileRequest) -> CompiledStep | None:
        """The verdict on a request, or None where there is none.

        Raises:
            OutOfMemoryError: the verdict is that the program does not fit.
        """
        if not self.reads:
            return None
        try:
            entry = json.loads(self._path(request).read_text(encoding="utf-8"))
            refusal: str | None = entry["refusal"]
            step: CompiledStep | None = from_record(CompiledStep | None, entry["step"])
        except (OSError, ValueError, KeyError, TypeError, AutoshardError):
            return None
        if refusal is not None:
            raise OutOfMemoryError(refusal)
        return step

    def put(self, request: CompileRequest, verdict: CompiledStep | OutOfMemoryError) -> None:
        """Keep a verdict. A folder that cannot be written keeps nothing."""
        refused = isinstance(verdict, OutOfMemoryError)
        entry = {
            "refusal": str(verdict) if refused else None,
            "step": None if refused else to_record(verdict),
        }
        path = self._path(request)
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, json.dumps(entry))

    def _path(self, request: CompileRequest) -> Path:
        question = to_record(request) | {"model": self.model_key, "installed": _installed()}
        question["settings"] = {k: v for k, v in os.environ.items() if k.startswith(_SETTINGS)}
        digest = hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()
        return self.folder / f"{digest}.json"


def verdict_cache(model: AbstractModel, *, reads: bool = True) -> VerdictCache | None:
    """The cache for a model, in the user's cache directory; None for one that has no key.

    Args:
        model: the whole model.
        reads: False to ask the compiler again, and keep its new answer.
    """
    backbone = type(model.backbone)
    config = model.recipe.config if model.recipe else None
    codes = (backbone.__module__, type(model.model).__module__)
    if config is None or not all(code.startswith("keras_hub.") for code in codes):
        return None
    described = [
        model.table().fingerprint,
        f"{backbone.__module__}.{backbone.__qualname__}",
        model.task,
        json.dumps(config, sort_keys=True, default=str),
    ]
    return VerdictCache(
        folder=Path(user_cache_dir("autoshard")) / "verdicts",
        model_key=hashlib.sha256("\n".join(described).encode()).hexdigest(),
        reads=reads,
    )


@cache
def _installed() -> dict[str, Any]:
    """Versions of the packages that compile, and a hash of this package's source."""
    source = hashlib.sha256()
    root = Path(__file__).parents[1]
    for path in sorted((*root.rglob("*.py"), *root.rglob("*.json"))):
        source.update(path.read_bytes())
    return {
        "format": _FORMAT,
        "autoshard": source.hexdigest(),
        **{package: installed_version(package) for package in _PACKAGES},
    }
