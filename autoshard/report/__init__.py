"""What a person reads: plans, comparisons, chips and findings as text, JSON and HTML."""

__all__: list[str] = []
