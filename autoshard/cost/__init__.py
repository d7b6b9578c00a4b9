"""What a step costs under a layout: compute, collectives and memory, by stated formulas."""
