"""Many machines, one model: neuron groups and slices of the head are spread over the devices of a cluster."""
