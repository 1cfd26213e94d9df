"""Tell over HTTP how a server does, whether or not it answers requests."""
