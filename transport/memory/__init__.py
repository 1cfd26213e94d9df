"""Keep account of memory that peers read, and of memory that pulls write to. No socket is known here."""
