"""How a gradient, low-rank or whole, becomes the direction that a weight moves in: one file a rule."""
