"""What is fuzzed: one harness for each kind of reader, server or cluster."""
