"""Be a router: take clients' requests as an engine does, and have nodes compute them."""
