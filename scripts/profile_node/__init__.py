"""Profile a node; twin and interference time their engines with the same parts."""
