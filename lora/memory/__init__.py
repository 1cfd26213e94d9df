"""Hold resident adapters in the rank pages of one arena."""
