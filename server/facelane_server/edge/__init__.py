"""The gRPC surface: services, authentication, and the only code that knows protobuf."""
