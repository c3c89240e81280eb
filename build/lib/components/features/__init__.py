"""Transitions -> transitions with point-in-time state features."""
