"""A recipe -> the Keras model without values.

Gemma 7B takes under a second and no weight memory.
"""

import copy
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from autoshard.errors import AutoshardError, ModelError, UsageError
from autoshard.model.abstract import abstract_scope, name_counts, recording_scope
from autoshard.model.folding import Folding
from autoshard.model.inputs import has_open_length, open_inputs, own_batch
from autoshard.model.keras_import import import_keras, import_keras_hub
from autoshard.model.variables import ModelTable, make_table
from autoshard.model.workload import DTYPES, Workload

__all__ = [
    "AbstractModel",
    "Recipe",
    "assemble",
    "build_recipe",
    "cannot_build",
    "check_own_rank",
    "inner_layers",
    "is_task",
    "layers_by_path",
    "one_line",
    "own_lora_rank",
    "with_task",
    "wrap",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How to build a model again, perhaps with fewer blocks.

    Attributes:
        name: the model as it was asked for.
        make: builds the backbone (or whole model) from a configuration; called in the scope.
        config: what `make` is given, a copy each time; None where nothing can be changed in it.
        task_class: the task around the backbone; None to take the backbone's CausalLM, if any.
        lora_rank: rank of the low-rank factors, or None.
        has_dtype: whether what `make` builds has a dtype policy of its own, whatever was asked for.
    """

    name: str
    make: Callable[[dict[str, Any]], Any]
    config: Mapping[str, Any] | None
    task_class: Any = None
    lora_rank: int | None = None
    has_dtype: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class AbstractModel:
    """A Keras model without values.

    Attributes:
        name: the model as it was asked for.
        backbone: the Keras model that holds the weights.
        model: the Keras model that a step calls: the task, or the backbone where there is none.
        task: the class of `model`.
        generates: whether `model` is a KerasHub CausalLM, with logits and `generate`.
        output_paths: layer outputs that Keras asks a LayoutMap for.
        recipe: how to build it again; None where that is not known.
        made_up: how many names of layers Keras had made up when it was built, by what they begin
            with.
        folding: which of its blocks stand for how many of the real model's.
        dtype: the dtype policy that it came with; None where it was built with the one asked for.
    """

    name: str
    backbone: Any
    model: Any
    task: str
    generates: bool
    output_paths: tuple[str, ...]
    recipe: Recipe | None
    made_up: Mapping[str, int]
    folding: Folding = field(default_factory=Folding)
    dtype: str | None = None

    def adapted(self, workload: Workload) -> Workload:
        """The workload with the model's own dtype and batch, where it has them, and its own length.

        That is 1 for a model that leaves no length open, as one of pictures.

        Raises:
            UsageError: the model came with a dtype in which no step is planned.
        """
        if self.dtype not in (None, *DTYPES):
            raise UsageError(
                f"'{self.name}' is made with dtype {self.dtype}, in which no step is planned: "
                f"make it with one of {', '.join(DTYPES)}"
            )
        seq_len = workload.seq_len if has_open_length(self.model) else 1
        return replace(
            workload,
            dtype=self.dtype or workload.policy,
            batch=own_batch(self.model) or workload.batch,
            seq_len=seq_len,
        )

    @property
    def compiled_with(self) -> str:
        """The optimizer that its author compiled it with, in lower case; "" for none.

        KerasHub compiles a task when it is made.
        """
        optimizer = getattr(self.model, "optimizer", None)
        if optimizer is None or self._is_of_keras_hub():
            return ""
        return type(getattr(optimizer, "inner_optimizer", optimizer)).__name__.lower()

    def numbered_layers(self) -> frozenset[str]:
        """Names that Keras gave to layers, for want of one: of their class, and a number.

        KerasHub names its layers, some after their class.
        """
        if self._is_of_keras_hub():
            return frozenset()
        return frozenset(
            layer.name for layer in self.model._flatten_layers() if self._is_made_up(layer)
        )

    def _is_of_keras_hub(self) -> bool:
        return type(self.backbone).__module__.startswith("keras_hub.")

    def _is_made_up(self, layer: Any) -> bool:
        from keras.src.utils.naming import to_snake_case

        stem = to_snake_case(type(layer).__name__)
        found = re.fullmatch(rf"{stem}(?:_(\d+))?", layer.name)
        return found is not None and int(found[1] or 0) < self.made_up.get(stem, 0)

    def open_sizes(self) -> str:
        """That 1 is taken of the sizes that inputs, as of pictures, leave open; "" for none."""
        names = ", ".join(open_inputs(self.model))
        told = f"of the sizes that {names} leaves open 1 is taken: give the keras.Input its sizes"
        return told if names else ""

    def table(self) -> ModelTable:
        """The variables, sorted into families.

        Raises:
            ModelError: there are none, as in a subclassed model that was not called.
        """
        weights = self.model.weights
        if not weights:
            raise ModelError(
                f"'{self.name}' has no weights: there is nothing to lay out; if they are made when "
                "it is first called, give a functional model, as keras.Model(inputs, "
                "model(inputs)) with a keras.Input makes one"
            )
        are_weights = {id(variable) for variable in weights}
        return make_table(
            self.name,
            [(v.path, tuple(v.shape), str(v.dtype), bool(v.trainable)) for v in weights],
            self.output_paths,
            [v.path for v in self.model.variables if id(v) not in are_weights],
        )


def build_recipe(recipe: Recipe, config: Mapping[str, Any] | None = None) -> AbstractModel:
    """Build a model from its recipe, without values.

    Args:
        recipe: how.
        config: another configuration than the recipe's, for example with fewer blocks.

    Raises:
        ModelError: Keras cannot build it without values; the text has Keras' reason.
    """
    given = copy.deepcopy(dict(config if config is not None else recipe.config or {}))
    before = name_counts()  # a callable may return a model that is there already
    try:
        with recording_scope() as recorder, abstract_scope(), warnings.catch_warnings():
            # Layers warn about masks and missing kernels, at every build, for planning in vain.
            warnings.simplefilter("ignore")
            backbone, model = assemble(recipe, given)
            made_up = before | name_counts()
    except AutoshardError:
        raise
    except Exception as error:
        raise cannot_build(recipe.name, error) from error
    if config is not None:
        recipe = replace(recipe, config=config)
    return wrap(recipe.name, backbone, model, recipe, recorder.paths, made_up)


def assemble(recipe: Recipe, config: dict[str, Any]) -> tuple[Any, Any]:
    """Have Keras build the backbone and the model around it, in whatever scope the caller is.

    Args:
        recipe: how.
        config: what `recipe.make` is given; it may be changed.

    Returns:
        The backbone, and the task, or the backbone again where there is none.
    """
    made = recipe.make(config)
    backbone = made.backbone if is_task(made) else made
    if recipe.lora_rank is not None:
        _enable_lora(recipe.name, backbone, recipe.lora_rank)
    return backbone, made if made is not backbone else with_task(backbone, recipe.task_class)


def wrap(
    name: str,
    backbone: Any,
    model: Any,
    recipe: Recipe | None,
    outputs: Iterable[str] = (),
    made_up: Mapping[str, int] | None = None,
) -> AbstractModel:
    """Describe a Keras model that exists, with values or without.

    Args:
        name: the model as it was asked for.
        backbone: the Keras model that holds the weights.
        model: the task around it, or the backbone itself.
        recipe: how to build it again, where that is known.
        outputs: layer outputs seen while it was built.
        made_up: names that Keras made up for it, see `name_counts`; by default those of now.
    """
    inside = [f"{path}/output" for path in (*layers_by_path(model), model.name)]
    return AbstractModel(
        name=name,
        backbone=backbone,
        model=model,
        task=type(model).__name__,
        generates=isinstance(model, import_keras_hub().models.CausalLM),
        output_paths=tuple(dict.fromkeys([*outputs, *inside])),
        recipe=recipe,
        made_up=name_counts() if made_up is None else made_up,
    )


def layers_by_path(model: Any) -> dict[str, Any]:
    """Every layer inside a Keras model that is called, by its path.

    A block that states its output's shape is not called at build, and layers without weights inside
    it are not built: those take the path they will have.
    """
    keras = import_keras()
    found: dict[str, Any] = {}
    inside = [(layer, layer.path or layer.name) for layer in inner_layers(model)]
    for layer, path in inside:
        if path not in found and not isinstance(layer, keras.layers.InputLayer):
            found[path] = layer
            inside.extend(
                (deeper, deeper.path or f"{path}/{deeper.name}") for deeper in inner_layers(layer)
            )
    return found


def inner_layers(layer: Any) -> list[Any]:
    """The layers right inside a Keras layer or model, in its order."""
    return list(layer._flatten_layers(recursive=False, include_self=False))


def own_lora_rank(model: Any) -> int | None:
    """The rank of the low-rank factors that a Keras model has.

    Args:
        model: what `build` takes; what is no Keras model has none yet.
    """
    rank: int | None = getattr(getattr(model, "backbone", model), "_lora_rank", None)
    return rank


def check_own_rank(name: str, model: Any, asked: int | None) -> int | None:
    """The rank of the low-rank factors that a Keras model has.

    Args:
        name: the model as it was asked for.
        model: the model.
        asked: the rank that its factors should have; None for any.

    Raises:
        UsageError: it has factors of another rank.
    """
    rank = own_lora_rank(model)
    if rank and asked not in (None, rank):
        raise UsageError(
            f"'{name}' has low-rank factors of rank {rank}, and rank {asked} is asked for: ask "
            f"for {rank}"
        )
    return rank


def _enable_lora(name: str, backbone: Any, rank: int) -> None:
    if check_own_rank(name, backbone, rank):
        return
    if not hasattr(backbone, "enable_lora"):
        raise UsageError(
            f"'{name}' has no enable_lora, which KerasHub's backbones have: call that of its "
            "layers where the model is made, and plan it for the workload train"
        )
    backbone.enable_lora(rank)


def cannot_build(name: str, error: BaseException, place: str = "", advice: str = "") -> ModelError:
    """What to raise where Keras cannot build a model.

    Args:
        name: the model as it was asked for.
        error: what Keras, or the caller's function, raised.
        place: where, to stand behind the name.
        advice: what to do, to stand at the end.
    """
    reason, needs, _ = one_line(error).partition(" requires TensorFlow")
    if needs:
        # Keras says to install it, but here it may be hidden, and it would be of no use.
        advice = ", which no step on JAX runs: plan the model behind that layer"
    return ModelError(f"Keras cannot build '{name}'{place}: {reason}{needs}{advice}")


def one_line(error: BaseException) -> str:
    """The kind of an error and the line of its text that says what went wrong."""
    text = str(error)
    # Keras puts the reason, in bold, behind a line that names the layer.
    inner = re.search(r"\x1b\[1m(.+?)\x1b\[0m", text, re.DOTALL)
    line = (inner[1] if inner else text).strip().partition("\n")[0]
    return f"{type(error).__name__}: {line}"


def with_task(backbone: Any, task_class: Any = None) -> Any:
    """The task around a backbone, as `fit` and `generate` use it.

    Without a class asked for, the backbone's own CausalLM; the backbone itself where it has none,
    or one that its outputs do not fit (EmbeddingGemma's are pooled).
    """
    if task_class is not None:
        return task_class(backbone=backbone, preprocessor=None)
    task_class = _causal_lm_class(type(backbone))
    if task_class is None:
        return backbone
    try:
        return task_class(backbone=backbone, preprocessor=None)
    except (AttributeError, TypeError, ValueError):
        return backbone


def _causal_lm_class(backbone_class: type) -> Any:
    keras_hub = import_keras_hub()
    if not issubclass(backbone_class, keras_hub.models.Backbone):
        return None
    classes = [keras_hub.models.CausalLM]
    for task_class in classes:
        classes.extend(task_class.__subclasses__())
    matching = [c for c in classes if getattr(c, "backbone_cls", None) is backbone_class]
    return min(matching, key=lambda c: (len(c.__name__), c.__name__), default=None)


def is_task(model: Any) -> bool:
    """Whether a Keras model is a KerasHub task around a backbone."""
    task_class = import_keras_hub().models.Task
    return isinstance(model, task_class) and model.backbone is not None
