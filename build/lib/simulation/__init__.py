"""A Gymnasium environment that stands in for the product: it makes logs, plays traffic and knows the truth."""
