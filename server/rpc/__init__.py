"""gRPC: servicers, error table, health, drain."""
