"""What a person calls a model -> the recipe to build it.

It may be: a preset of the catalogue; `package.module:callable`; a local preset directory, a
`.keras` file or a `config.json`; a `kaggle://` or `hf://` handle; a Keras model; a callable.
"""

import importlib
import importlib.util
import json
import os
import sys
import traceback
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from autoshard.errors import ModelError, UsageError
from autoshard.model import catalogue
from autoshard.model.keras_import import import_keras, import_keras_hub
from autoshard.model.recipe import Recipe, cannot_build, one_line
from autoshard.model.workload import DEFAULT_DTYPE

__all__ = ["recipe_of"]

# What to say of Python code without a name in it.
_NAME_CALLABLE = "{}: name a callable in it that returns the model, as in {}:make_model"


def recipe_of(
    reference: str | os.PathLike[str] | Callable[[], Any], dtype: str | None, lora_rank: int | None
) -> Recipe:
    """Read a reference.

    Args:
        reference: a model's name, a path, or a callable that returns a Keras model.
        dtype: Keras dtype policy to build it with, where that can be chosen; None for the default,
            and for what a callable makes under Keras' own or a file has.
        lora_rank: rank of the low-rank factors, or None.

    Raises:
        UnknownNameError: no preset has that name, and it is no file, handle or callable.
        UsageError: the callable cannot be imported.
        ModelError: the file holds no model.
    """
    if isinstance(reference, os.PathLike):
        reference = os.fspath(reference)
    if not isinstance(reference, str):
        if not callable(reference):
            raise UsageError(
                f"the model is {reference!r}; give a preset's name, a Keras model, or a callable "
                "that returns one"
            )
        return _from_callable(_import_path(reference), reference, dtype, lora_rank)
    if "://" in reference:
        return _from_preset(reference, dtype, lora_rank)
    path = Path(reference)
    if reference and os.path.isfile(path / "config.json"):
        return _from_preset(reference, dtype, lora_rank)
    if reference and os.path.isdir(path) and reference not in catalogue.names():
        raise ModelError(f"the folder '{reference}' is no preset: it has no config.json")
    if path.suffix in (".keras", ".json"):
        return _from_file(path, dtype, lora_rank)
    if path.suffix == ".py":
        raise UsageError(_NAME_CALLABLE.format(f"'{reference}' is Python source", path.stem))
    if ":" in reference:
        return _from_callable(reference, _imported(reference), dtype, lora_rank)
    is_known = reference in catalogue.names()
    if not is_known and reference.isidentifier() and importlib.util.find_spec(reference):
        raise UsageError(_NAME_CALLABLE.format(f"'{reference}' is a module", reference))
    preset = catalogue.get(reference)
    backbone_class = getattr(import_keras_hub().models, preset.class_name, None)
    if backbone_class is None:
        raise ModelError(
            f"preset '{reference}' needs keras_hub.models.{preset.class_name}, which the installed "
            "KerasHub does not have; upgrade keras-hub"
        )
    # A quantized preset says of each layer what it is stored as, and keeps that.
    given = preset.config()
    return Recipe(
        name=reference,
        make=backbone_class.from_config,
        config={"dtype": dtype or DEFAULT_DTYPE, **given},
        lora_rank=lora_rank,
        has_dtype="dtype" in given,
    )


def _import_path(function: Callable[[], Any]) -> str:
    """`module:name` where that finds the callable again, in another process too; else its name."""
    name: str = getattr(function, "__name__", type(function).__name__)
    module = getattr(function, "__module__", None) or "__main__"
    found: Any = sys.modules.get(module)
    path = getattr(function, "__qualname__", name)
    for part in path.split("."):
        found = getattr(found, part, None)
    return f"{module}:{path}" if found is function and module != "__main__" else name


def _imported(reference: str) -> Callable[[], Any]:
    module_name, _, attribute = reference.partition(":")
    if module_name.endswith(".py"):
        path = Path(module_name).with_suffix("")
        is_below = not path.is_absolute() and ".." not in path.parts
        module = ".".join(path.parts) if is_below else path.name
        where = "" if is_below else f", in the folder {path.parent}"
        raise UsageError(f"'{module_name}' is a file; name its module: {module}:{attribute}{where}")
    try:
        with redirect_stdout(sys.stderr):  # what it prints is no output of ours
            made: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            made = getattr(made, part)
    except (Exception, SystemExit) as error:  # whatever the user's module does when imported
        raise UsageError(f"cannot import '{reference}': {one_line(error)}") from error
    if not callable(made):
        raise UsageError(f"'{reference}' is no callable that returns a Keras model")
    function: Callable[[], Any] = made
    return function


@contextmanager
def _default_dtype(dtype: str | None) -> Iterator[None]:
    """Keras' default dtype policy inside; None leaves it as it is."""
    keras = import_keras()
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(dtype or before)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


def _from_callable(
    name: str, function: Callable[[], Any], dtype: str | None, lora_rank: int | None
) -> Recipe:
    keras = import_keras()

    def make(config: dict[str, Any]) -> Any:
        try:
            with _default_dtype(dtype), redirect_stdout(sys.stderr):
                model = function()
        except (Exception, SystemExit) as error:  # whatever the user's function does
            raise cannot_build(name, error, place=_place(function, error)) from error
        if not isinstance(model, keras.Model):
            raise UsageError(f"'{name}' returned {type(model).__name__}, not a Keras model")
        return model

    return Recipe(name=name, make=make, config=None, lora_rank=lora_rank, has_dtype=True)


def _place(function: Callable[[], Any], error: BaseException) -> str:
    """The last line of a function's file that an error went through, in brackets."""
    source = getattr(getattr(function, "__code__", None), "co_filename", None)
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == source]
    return f" ({Path(str(source)).name}, line {lines[-1]})" if lines else ""


def _from_preset(handle: str, dtype: str | None, lora_rank: int | None) -> Recipe:
    """A handle or a preset directory: Keras' own loader reads its configuration alone."""
    keras_hub = import_keras_hub()

    def make(config: dict[str, Any]) -> Any:
        return keras_hub.models.Backbone.from_preset(
            handle, load_weights=False, dtype=dtype or DEFAULT_DTYPE
        )

    return Recipe(name=handle, make=make, config=None, lora_rank=lora_rank)


def _from_file(path: Path, dtype: str | None, lora_rank: int | None) -> Recipe:
    keras, keras_hub = import_keras(), import_keras_hub()
    try:
        if path.suffix == ".keras":
            with zipfile.ZipFile(path) as archive:
                text = archive.read("config.json").decode()
        else:
            text = path.read_text(encoding="utf-8")
        config = json.loads(text)
    except FileNotFoundError:
        raise UsageError(f"there is no model '{path}'") from None
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise ModelError(f"cannot read a model from '{path}': {one_line(error)}") from error
    if not isinstance(config, dict) or "class_name" not in config:
        raise ModelError(
            f"'{path}' is not the configuration of a Keras model: it names no class; for a model "
            "of another library give its directory"
        )
    made = keras.saving.get_registered_object(config.get("registered_name"))
    is_backbone = isinstance(made, type) and issubclass(made, keras_hub.models.Backbone)
    settings = config.get("config")
    if is_backbone and dtype is not None and isinstance(settings, dict):
        settings["dtype"] = dtype

    def make(config: dict[str, Any]) -> Any:
        try:
            model = keras.saving.deserialize_keras_object(config)
        except Exception as error:  # whatever the classes in it do
            advice = "; a model with layers of your own is given as package.module:callable"
            raise cannot_build(str(path), error, advice=advice) from error
        if not isinstance(model, keras.Model):
            raise ModelError(f"'{path}' is not the configuration of a Keras model")
        return model

    return Recipe(name=str(path), make=make, config=config, lora_rank=lora_rank, has_dtype=True)
