"""Be a node of a cluster: obey the coordinator, and have every adapter that a request is sent with."""
