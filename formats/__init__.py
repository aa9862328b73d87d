"""Bytes on disk as named lazy tensors, and back. Knows containers, not models."""
