"""A plan, run for real: weights, `predict`, `generate`, `fit`, on virtual CPU devices."""

__all__: list[str] = []
