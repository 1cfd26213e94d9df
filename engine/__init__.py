"""The engine does: it turns requests into steps, steps into tokens, tokens into answers."""
