"""Say what an operator may choose, and read it from the command line, a file and the environment."""
