"""How alike two models look, and how faithful a map is to its model."""
