"""Project vectors to the vocabulary and factorise gradients: pure functions over tensors."""
