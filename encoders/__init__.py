"""Encoders: pixels, boxes, frames, ids -> tokens."""
