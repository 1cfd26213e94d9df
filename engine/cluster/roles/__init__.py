"""Assemble what a process is in a cluster: a node, a router or the coordinator."""
