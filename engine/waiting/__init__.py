"""waiting holds what requests wait for beside their tokens: work in threads, files and peers, never without an end."""
