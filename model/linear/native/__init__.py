"""The matrix product of a CPU in C++, compiled when the project is installed where there is a compiler."""
