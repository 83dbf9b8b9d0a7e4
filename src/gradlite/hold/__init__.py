"""How a tensor waits for the backward pass: as it is, as codes, elsewhere, or not at all. Knows tensors, not operators."""
