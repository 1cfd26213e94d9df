"""Carry events to the coordinator, and commands and the catalogue of adapters back."""
