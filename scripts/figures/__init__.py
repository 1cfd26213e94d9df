"""Figures of simulated clusters: each module asks for its runs, keeps their rows, and draws them."""
