"""Hold the messages of the gRPC services: declarations, and the code that `protoc` makes of them."""
