"""One command becomes a whole cluster: on this machine, or on the machines of a Ray cluster."""
