"""Ways to ask a model where it looks: model and images → maps."""
