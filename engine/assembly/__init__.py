"""Build a working engine from a configuration: the one folder where the parts are wired together."""
