"""Own the registry of adapters: what names mean, what was asked for them, and what administrators are told."""
