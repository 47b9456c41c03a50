"""The embedded demo model: a small invented world, the texts about it, and the network that learns them."""
