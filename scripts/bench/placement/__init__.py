"""Placement on live nodes: policies compared under shifting popularity, beside what the simulator foretells."""
