"""names holds what adapter names mean: the table, what folders and peers say, and the trial of a content."""
