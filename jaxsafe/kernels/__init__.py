"""Jitted pure functions on arrays and trees."""
