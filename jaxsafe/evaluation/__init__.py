"""Judges of responses and metrics over their verdicts."""
