"""Where adapters lie in a simulated node: on the card's pages, and in the host's memory."""
