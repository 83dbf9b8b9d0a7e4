"""Bases, residual samples, the error memory, and how moments move with the basis. Pure functions on tensors."""
