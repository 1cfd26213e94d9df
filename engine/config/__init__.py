"""config declares what an operator may choose, and reads it from the command line, a file and the environment."""
