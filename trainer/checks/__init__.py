"""What is wrong with a configuration, or looks wrong."""
