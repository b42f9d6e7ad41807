"""The flow graph of a forward pass (VISIT, Katz & Belinkov 2023): pure functions over tensors."""
