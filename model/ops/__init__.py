"""What a layer computes between its matrices."""
