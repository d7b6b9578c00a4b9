"""The step as ops whose dimensions are named and linked, and how a layout spreads through it."""
