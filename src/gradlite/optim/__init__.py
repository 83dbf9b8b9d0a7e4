"""The optimizer: a thin shell over pure per-tensor steps, 8-bit moments, and stochastic rounding."""
