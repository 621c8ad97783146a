"""What the UNet learns: inputs, noise, targets, losses."""
