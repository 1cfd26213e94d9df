"""A virtual cluster that runs the real decision code against a cost model."""
