"""Serve administrators: what the registry of adapters and the cluster are, and changes of the registry."""
