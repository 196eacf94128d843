"""Mathematics: tensors in, tensors out; no state, device, rank or logging."""
