"""Let a node obey its coordinator: it fetches, keeps and frees adapters, reports, and leaves when it may."""
