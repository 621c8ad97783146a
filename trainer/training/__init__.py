"""How it learns: which weights, by which gradients, clip, optimizer and rate."""
