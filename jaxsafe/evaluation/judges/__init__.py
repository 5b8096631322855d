"""Judges: did a response refuse?"""
