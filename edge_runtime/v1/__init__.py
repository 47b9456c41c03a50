"""Messages and stubs of the gRPC API, generated from ``proto/edge_runtime/v1`` by ``make proto``."""
