"""metrics counts and times what the engine does, and writes it for Prometheus and for logs."""
