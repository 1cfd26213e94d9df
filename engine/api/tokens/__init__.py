"""Token ids in, token ids out: what training loops ask, in vLLM's shapes."""
