"""Serve over gRPC: clients' protocol, health and reflection, and servers that strangers cannot stop or fill.

The library behind gRPC writes a line to standard error for each failed handshake, unless it is told not to before it is
loaded. Whoever imports it imports this package first.
"""

import os

os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
