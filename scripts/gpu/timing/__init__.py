"""Timings beside what the machine allows."""
