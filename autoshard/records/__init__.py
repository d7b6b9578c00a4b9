"""The values inside a plan, and how dataclasses become JSON and come back."""
