"""Other people's clients, unmodified and each in an environment of its own, against the embedded model."""
