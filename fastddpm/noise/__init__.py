"""noise-v1: the contract and its twin in plain PyTorch, seeds, and known answers."""
