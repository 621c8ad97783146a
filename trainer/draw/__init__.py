"""The command that draws with finished models and LoRAs, to compare them."""
