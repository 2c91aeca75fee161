"""A conversation with the adapter or the base: its state, its answers, and how it looks in a terminal or a browser."""
