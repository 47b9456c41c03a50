"""Edge runtime: LLM inference and on-device adaptation for small computers."""

__version__ = "0.1.0"
