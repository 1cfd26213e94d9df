"""Talk over control connections: their messages, deadlines, threads and trust."""
