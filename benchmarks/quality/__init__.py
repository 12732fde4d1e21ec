"""How well does a model learn with MISA and with its peers in the same memory? Research, hours of training."""
