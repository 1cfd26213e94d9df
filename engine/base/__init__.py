"""base chooses the model that an engine computes with, its device, its backends and what memory there is."""
