"""Carry requests from a router to a node, and tokens back: one gRPC stream for each pair."""
