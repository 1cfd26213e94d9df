"""What turns prompts and conversations into text that fits, beside the tokenizer itself."""
