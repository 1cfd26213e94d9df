"""Train the embedded model and its adapters."""
