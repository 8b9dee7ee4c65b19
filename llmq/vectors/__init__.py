"""Codebooks of vectors: how they are learned, how codes are chosen from them, and how both get better together."""
