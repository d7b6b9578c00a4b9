"""A compiler's out-of-memory message as one sentence: sizes, and the largest buffers by name.

The TPU compiler refuses a program in one of two ways: before it has laid out memory, with the total
alone, or after it, with a list of the largest allocations, each with its operation, shape and size.
"""

import re

from autoshard.units import format_bytes

__all__ = ["exhausted_sentence"]

_UNITS = {"": 1, "B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = r"(\d+(?:\.\d+)?)([KMGT]?)B?"
_NEEDS = (
    re.compile(rf"Used {_SIZE} of {_SIZE} hbm"),
    re.compile(rf"temporaries \({_SIZE}\) exceeds available HBM \({_SIZE}\)"),
)
_ALLOCATION = re.compile(
    rf"^\s*\d+\. Size: {_SIZE}\s*$(?P<body>.*?)(?=^\s*\d+\. Size|\Z)", re.MULTILINE | re.DOTALL
)
_OPERATION = re.compile(r'op_name="([^"]*)"')
_SHAPE = re.compile(r"Shape: (\w+\[[\d,]*\])")
_N_SHOWN = 3


def exhausted_sentence(message: str, target: str) -> str:
    """Say what a RESOURCE_EXHAUSTED error says.

    Args:
        message: the error's whole text.
        target: what was compiled for.

    >>> exhausted_sentence("RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory "
    ... "required for HLO temporaries (18.77G) exceeds available HBM (15.75G).", "tpu:v5e:2x2")
    'the step does not fit tpu:v5e:2x2: a device needs 18.77 GiB and has 15.75 GiB, 3.02 GiB less'
    """
    sizes = next((found for pattern in _NEEDS if (found := pattern.search(message))), None)
    head = f"the step does not fit {target}"
    if sizes is None:
        said = message.partition("RESOURCE_EXHAUSTED:")[2].strip() or message.strip()
        return f"{head}: {said.partition(chr(10))[0]}"
    needed, available = _bytes(*sizes.groups()[:2]), _bytes(*sizes.groups()[2:4])
    text = (
        f"{head}: a device needs {format_bytes(needed)} and has {format_bytes(available)}, "
        f"{format_bytes(needed - available)} less"
    )
    largest = [_named(found) for found in _ALLOCATION.finditer(message)][:_N_SHOWN]
    return f"{text}; the largest buffers: {', '.join(largest)}" if largest else text


def _bytes(number: str, unit: str) -> float:
    return float(number) * _UNITS[unit]


def _named(found: "re.Match[str]") -> str:
    """`1.95 GiB bf16[8,512,256000] of jvp(net)/logits/dot_general`."""
    size, body = format_bytes(_bytes(found[1], found[2])), found["body"]
    shape, operation = _SHAPE.search(body), _OPERATION.search(body)
    name = operation[1].removeprefix("jit(step)/") if operation else "an unnamed one"
    return f"{size} {shape[1] if shape else ''} of {name}".replace("  ", " ")
