"""What a person reads: plans, comparisons, chips and findings as text, JSON and Markdown."""

__all__: list[str] = []
