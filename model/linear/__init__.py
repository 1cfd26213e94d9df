"""Multiply rows by a base matrix: the seam, the forms in which a matrix is kept, and the choice among them."""
