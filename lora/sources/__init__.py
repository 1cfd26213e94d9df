"""Fetch adapters' files from where a URL says they are: object stores, HTTP servers, the hub."""
