"""A layer's arithmetic between its matrices in C++, compiled where there is a compiler."""
