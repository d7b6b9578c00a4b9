"""Chips and their links: what a device computes, remembers and sends a second.

`chips` holds the table (every number with its source), `targets` the machines that a plan is for,
`links` what carries a mesh axis, `collectives` what a collective over it costs, and `efficiency`
what of its peak a matrix multiplication reaches.
"""

__all__: list[str] = []
