"""The model as the planner sees it: variables without values, and the step as a jaxpr."""

__all__: list[str] = []
