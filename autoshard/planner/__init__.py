"""The planner: a model, a mesh and chips in, ranked layout maps out.

In order: `setup` says what is planned for, `tracing` makes the op graph, `pricing` scores maps,
`planning` runs search and rules on one mesh, `mesh_shapes` on all of so many devices, `settling`
asks a compiler, `doubts` says why a plan may not be what it seems, `plan_value` makes a plan of
what was found, and `remedies` looks for what would fit where nothing does.
"""
