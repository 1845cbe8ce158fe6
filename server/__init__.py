"""The inference server, its client and its command line."""
