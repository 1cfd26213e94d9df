"""Answer files of requests: the lines, their results, and over HTTP the files and batches that clients keep here."""
