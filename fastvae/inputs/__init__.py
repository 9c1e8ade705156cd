"""Users' arguments, read once: batches, nested tensors, decoder outputs, modules, the last layer."""
