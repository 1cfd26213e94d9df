"""Everything that is run and not imported by the engine; each folder and module starts as `python -m scripts.NAME`."""
