"""The engine as a service: gRPC and HTTP, many requests at once, for months."""
