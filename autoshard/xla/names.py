"""JAX's name stacks, as XLA carries them along: which layer an instruction belongs to, and when.

A name stack reads `jit(step)/transpose(jvp(backbone))/decoder_block_0/attention/dot_general`:
transformations wrap the outermost scope that they cover, scopes are the names of Keras layers, and
the last part is the primitive. Instructions that XLA merged carry `prefix/(a/add:b/add)`.
"""

import re
from collections.abc import Collection

__all__ = ["layer_of", "layer_prefixes", "phase_of", "template"]

_WRAPPER = re.compile(r"^[\w.]+\((.*)\)$")
_MERGED = re.compile(r"\(([^()]*(?:\([^()]*\)[^()]*)*):.*\)")


def layer_prefixes(paths: Collection[str]) -> frozenset[str]:
    """The layers that own variables: every proper prefix of a variable's path.

    >>> sorted(layer_prefixes(["block_0/query/kernel"]))
    ['block_0', 'block_0/query']
    """
    return frozenset(
        "/".join(parts[:n])
        for parts in (path.split("/") for path in paths)
        for n in range(1, len(parts))
    )


def _scopes(op_name: str) -> list[str]:
    """The scopes of a name stack, without transformations; of merged ones the first."""
    if merged := _MERGED.search(op_name):
        head = merged[1] if "/" in merged[1] else f"{merged[1]}/op"
        op_name = op_name[: merged.start()] + head
    scopes = []
    depth, start = 0, 0
    for position, letter in enumerate(op_name + "/"):
        depth += (letter == "(") - (letter == ")")
        if letter == "/" and depth <= 0:
            scopes.append(op_name[start:position])
            start = position + 1
    inner = []
    for scope in scopes[:-1]:
        if scope.startswith(("jit(", "pjit(")):
            continue
        while match := _WRAPPER.match(scope):
            scope = match[1]
        inner += scope.split("/")
    return [scope for scope in inner if scope]


def layer_of(op_name: str, layers: Collection[str]) -> str:
    """The innermost layer of a name stack.

    Args:
        op_name: the name stack.
        layers: paths of the layers that are known, see `layer_prefixes`.

    Returns:
        The longest known path found in the stack, or an empty text.

    >>> layer_of("jit(f)/jvp(net)/block_0/query/abc,cd->abd/dot_general", ["block_0/query"])
    'block_0/query'
    """
    scopes = _scopes(op_name)
    found = ""
    for start in range(len(scopes)):
        for end in range(len(scopes), start, -1):
            path = "/".join(scopes[start:end])
            if path in layers:
                found = max(found, path, key=lambda known: known.count("/") + bool(known))
                break
    return found


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
        # Keras leaves the number of the first layer of a name out.
        base = re.escape(block.removesuffix("_*"))
        if match := re.match(rf"{base}(?:_\d+)?(?=/|$)", layer):
            return block + layer[match.end() :]
    return layer
