"""Make one service of many nodes: routers that forward, a coordinator that places adapters, nodes that obey it."""
