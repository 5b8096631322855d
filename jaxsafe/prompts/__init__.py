"""Prompt sets: strings and labels, no arrays."""
