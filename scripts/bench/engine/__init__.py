"""Offline speed beside other engines and the limit."""
