"""The batched LoRA operation behind one protocol."""
