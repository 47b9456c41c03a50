"""Pure planning: device and link profiles in, a plan of neuron groups out. No I/O, no engine import."""
