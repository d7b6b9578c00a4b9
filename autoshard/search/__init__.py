"""The search for the best layout: candidates, descent, lower bound and the exact solver."""
