"""Decision log -> transitions."""
