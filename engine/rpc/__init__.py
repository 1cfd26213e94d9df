"""Serve gRPC: the protocol of vLLM's clients, health and reflection; and what every gRPC server here shares."""
