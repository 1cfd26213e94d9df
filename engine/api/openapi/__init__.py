"""The API's description of itself, as an OpenAPI document."""
