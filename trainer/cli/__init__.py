"""From command-line arguments to a configuration that can work."""
