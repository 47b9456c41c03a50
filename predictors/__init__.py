"""Pure importance prediction: hidden states in, importance of each neuron group out. No engine import."""
