"""What docs/write_api_reference.py reads the reference from."""
