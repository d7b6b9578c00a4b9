"""Ahead-of-time compilation for a target, and what the compiler's program says."""
