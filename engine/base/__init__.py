"""Choose the base model, its device, and the backends that its steps are computed with."""
