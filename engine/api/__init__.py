"""The doors: OpenAI-compatible HTTP; each translates a wire schema into Requests and TokenEvents back."""
