"""Proof that a packed folder is what it should be: what every loader makes of it, and where every tensor went."""
