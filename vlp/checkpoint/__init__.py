"""Checkpoints: written whole or not at all, read strictly, lifted from older formats."""
