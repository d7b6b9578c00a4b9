"""Solve instances of the IOPDDL contest on intra-operator parallelism with autoshard's solver.

    python examples/benchmarks/solver.py FILE... [--time-limit SECONDS]

FILE is `.json` or `.json.gz` as published at github.com/google/iopddl. Costs and bounds are those
of the contest's objective; seconds are measured from the problem in memory to the answer.
"""

import argparse
import time
from pathlib import Path

from iopddl import read_iopddl
from tabulate import tabulate

from autoshard.errors import AutoshardError
from autoshard.search.solver import solve

HEADERS = (
    "instance",
    "nodes",
    "edges",
    "after reduction",
    "cost",
    "bound",
    "gap",
    "proven",
    "seconds (measured)",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", metavar="FILE", nargs="+", type=Path)
    parser.add_argument(
        "--time-limit", type=float, metavar="SECONDS", help="stop each instance after about this"
    )
    arguments = parser.parse_args()
    rows = []
    for path in arguments.files:
        try:
            rows.append(solved_row(path, arguments.time_limit))
        except AutoshardError as error:
            parser.error(str(error))
    print(tabulate(rows, headers=HEADERS, disable_numparse=True, stralign="right"))


def solved_row(path: Path, time_limit: float | None) -> tuple[str, ...]:
    """Read and solve one instance; a row of the table."""
    problem = read_iopddl(path)
    start = time.perf_counter()
    solution = solve(problem, time_limit=time_limit)
    seconds = time.perf_counter() - start
    return (
        path.name.removesuffix(".gz").removesuffix(".json"),
        f"{len(problem.nodes):,}",
        f"{len(problem.edges):,}",
        f"{solution.n_reduced_nodes:,} nodes, {solution.n_reduced_edges:,} edges",
        f"{solution.cost:,.0f}" if solution.feasible else solution.status,
        f"{solution.bound:,.0f}",
        f"{solution.gap:.2e}",
        "yes" if solution.proven else "no",
        f"{seconds:.2f}",
    )


if __name__ == "__main__":
    main()
