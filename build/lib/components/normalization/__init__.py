"""Feature values -> a normalization spec, and the graph that applies it."""
