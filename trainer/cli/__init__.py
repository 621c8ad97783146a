"""From command-line arguments to a configuration, and what is wrong with them."""
