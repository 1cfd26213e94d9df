"""lora owns adapters: their format, their memory, their residency and their arithmetic."""
