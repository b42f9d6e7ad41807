"""Reading vectors in the vocabulary and gradients as factors: pure functions over tensors."""
