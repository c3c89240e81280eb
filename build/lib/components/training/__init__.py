"""Training data + normalization spec -> a policy bundle."""
