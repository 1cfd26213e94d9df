"""Which node runs a request: policies of one protocol."""
