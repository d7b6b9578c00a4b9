"""The search for the best layout: candidates, descent, and a relaxed problem for bound and start.

That problem is one of choosing a strategy a node; `autoshard.search.solver` solves such problems
exactly too, beyond the dual ascent that the planner needs.
"""
