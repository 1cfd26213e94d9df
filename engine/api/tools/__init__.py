"""Tools that a chat's model may call: what a body asks for, and the calls in what the model writes. Knows no HTTP."""
