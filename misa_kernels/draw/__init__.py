"""Which tensors are sampled, as what, and which come next? Numbers and names; no device, no step."""
