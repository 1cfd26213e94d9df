"""Draw or read workloads: requests, lengths, popularity and adapters."""
