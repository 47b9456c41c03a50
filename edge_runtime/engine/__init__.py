"""One model on one machine. Knows nothing of networks or users."""
