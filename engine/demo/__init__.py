"""The embedded model: a small base, its adapters, and the tasks that check their answers."""
