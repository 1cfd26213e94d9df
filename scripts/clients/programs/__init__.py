"""One small program a client: what somebody who uses the client would write."""
