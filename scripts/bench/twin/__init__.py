"""The simulator beside a live engine."""
