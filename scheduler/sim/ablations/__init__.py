"""Hold policies that only ablations run."""
