"""Make one service of many nodes: routers that forward, a coordinator that places adapters, nodes that obey it."""

import engine.rpc  # noqa: F401  # pyright: ignore[reportUnusedImport] - before gRPC is loaded
