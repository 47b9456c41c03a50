"""Changes of a model on the device: knowledge edits by forward passes alone, and the store of adapters."""
