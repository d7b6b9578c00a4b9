"""The values inside a plan and other results, which become JSON."""
