"""Reads choice problems in the format of the IOPDDL contest (google/iopddl, ASPLOS 2025).

A file holds `{"problem": {"name", "nodes": {"intervals", "costs", "usages"}, "edges": {"nodes",
"costs"}, "usage_limit"}}`: a node has a live interval `[start, stop)` and a cost and a usage a
strategy; an edge a cost table flattened row by row, in which 1e18 or more is forbidden.
"""

import gzip
import json
import math
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from autoshard.errors import UsageError
from autoshard.search.problem import Edge, Node, Problem

__all__ = ["read_iopddl"]

_FORBIDDEN = 1e18


def read_iopddl(path: Path) -> Problem:
    """Read an instance.

    Args:
        path: a `.json` or `.json.gz` file.

    Raises:
        UsageError: the file is not there or does not hold an instance.
    """
    try:
        data = path.read_bytes()
        if path.suffix == ".gz":
            data = gzip.decompress(data)
        return _problem(json.loads(data)["problem"])
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error}") from error
    except (ValueError, KeyError, TypeError, IndexError, EOFError, zlib.error) as error:
        raise UsageError(f"{path} is not an IOPDDL instance: {error!r}") from error


def _problem(data: dict[str, Any]) -> Problem:
    nodes = tuple(
        Node(costs=_costs(costs), usages=tuple(map(float, usages)), interval=(start, stop))
        for costs, usages, (start, stop) in zip(
            data["nodes"]["costs"],
            data["nodes"]["usages"],
            data["nodes"]["intervals"],
            strict=True,
        )
    )
    edges = []
    for (u, v), flat in zip(data["edges"]["nodes"], data["edges"]["costs"], strict=True):
        costs, n_columns = _costs(flat), len(nodes[v].costs)
        rows = tuple(costs[i : i + n_columns] for i in range(0, len(costs), n_columns))
        edges.append(Edge(source=u, target=v, costs=rows))
    limit = data.get("usage_limit")
    return Problem(
        nodes=nodes, edges=tuple(edges), memory_limit=None if limit is None else float(limit)
    )


def _costs(values: Sequence[float]) -> tuple[float, ...]:
    return tuple(math.inf if value >= _FORBIDDEN else float(value) for value in values)
