"""Pictures that the model draws."""
