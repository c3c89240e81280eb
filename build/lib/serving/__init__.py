"""Policies in service: Triton, the canary, its analysis, and the client."""
