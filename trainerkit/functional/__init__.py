"""Functions of tensors that several parts share."""
