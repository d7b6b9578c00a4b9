"""JAX's name stacks, as XLA carries them along: which layer an instruction belongs to, and when.

A name stack reads `jit(step)/transpose(jvp(backbone))/decoder_block_0/attention/dot_general`:
transformations wrap the outermost scope that they cover, scopes are the names of Keras layers, and
the last part is the primitive. Instructions that XLA merged carry `prefix/(a/add:b/add)`.
"""

import re
from collections.abc import Collection, Mapping

from autoshard.model.paths import block_pattern, layer_templates, path_templates

__all__ = ["alternatives", "layer_of", "layer_paths", "phase_of", "template"]

_WRAPPER = re.compile(r"^[\w.]+\((.*)\)$")


def layer_paths(variable_paths: Collection[str]) -> dict[str, str]:
    """The layers that own variables, by every proper prefix of a variable's path.

    Returns:
        Layer path -> the path to show: without the counters that Keras keeps over all blocks.

    >>> layer_paths(["block_0/mlp/kernel", "block_1/mlp_1/kernel"])["block_1/mlp_1"]
    'block_1/mlp'
    """
    shown: dict[str, str] = {}
    for layer, found in layer_templates(path_templates(variable_paths)).items():
        parts = zip(layer.split("/"), found.split("/"), strict=True)
        shown[layer] = "/".join(part if "*" in name else name for part, name in parts)
    return shown


def _split(text: str, separator: str) -> list[str]:
    """Split outside of brackets."""
    parts, depth, start = [], 0, 0
    for position, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if letter == separator and depth == 0:
            parts.append(text[start:position])
            start = position + 1
    return [*parts, text[start:]]


def alternatives(op_name: str) -> list[str]:
    """The name stacks of the instructions that XLA merged into one, or the one as it is.

    >>> alternatives("jit(f)/net/(a/add:b/add)")
    ['jit(f)/net/a/add', 'jit(f)/net/b/add']
    """
    scopes = _split(op_name, "/")
    for place, scope in enumerate(scopes):
        if scope.startswith("(") and scope.endswith(")"):
            before, after = scopes[:place], scopes[place + 1 :]
            return ["/".join([*before, one, *after]) for one in _split(scope[1:-1], ":")]
    return [op_name]


def _scopes(op_name: str) -> list[str]:
    """The scopes of a name stack without transformations, function names and the primitive."""
    scopes: list[str] = []
    for scope in _split(alternatives(op_name)[0], "/")[:-1]:
        if scope.startswith(("jit(", "pjit(")):
            continue
        while match := _WRAPPER.match(scope):
            scope = match[1]
        scopes += scope.split("/")
    return [scope for scope in scopes if scope]


def layer_of(op_name: str, layers: Mapping[str, str]) -> str:
    """The innermost layer of a name stack.

    Args:
        op_name: the name stack.
        layers: the layers that are known, see `layer_paths`.

    Returns:
        The longest known path found in the stack, as it is shown, or an empty text.

    >>> layers = layer_paths(["block_0/query/kernel"])
    >>> layer_of("jit(f)/jvp(net)/block_0/query/abc,cd->abd/dot_general", layers)
    'block_0/query'
    """
    scopes = _scopes(op_name)
    found: tuple[str, ...] = ()
    for start in range(len(scopes)):
        for end in range(len(scopes), start + len(found), -1):
            if "/".join(scopes[start:end]) in layers:
                found = tuple(scopes[start:end])
                break
    return layers.get("/".join(found), "")


def phase_of(op_name: str, *, differentiated: bool) -> str:
    """When an instruction runs: `forward`, `backward` or `update`.

    Args:
        op_name: the name stack; `transpose(jvp(f))` is the backward pass of `f`, `jvp(f)` its
            forward pass.
        differentiated: whether the step takes gradients at all; what is neither pass then updates
            the weights.
    """
    if "transpose(" in op_name or "rematted_computation" in op_name:
        return "backward"
    if not differentiated or "jvp(" in op_name or not op_name:
        return "forward"
    return "update"


def template(layer: str, blocks: Collection[str]) -> str:
    """The layer with the index of its repeated block as `*`.

    Args:
        layer: path of a layer.
        blocks: templates of the repeated blocks, such as `decoder_block_*`.

    >>> template("decoder_block_12/ffw_gating_2", ["decoder_block_*"])
    'decoder_block_*/ffw_gating_2'
    """
    for block in blocks:
        if match := re.match(rf"{block_pattern(block)}(?=/|$)", layer):
            return block + layer[match.end() :]
    return layer
