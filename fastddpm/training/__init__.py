"""Training with the simple loss, and the bound on the likelihood."""
