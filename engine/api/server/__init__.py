"""The socket side of the HTTP API: connections, bodies, and how fast the event loop answers."""
