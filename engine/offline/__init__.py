"""What offline use takes from its caller, and how it is interrupted."""
