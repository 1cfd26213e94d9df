"""Talk over control connections: messages, deadlines, threads and trust. No path for bulk bytes is known here."""
