"""The cost of placing and simulating."""
