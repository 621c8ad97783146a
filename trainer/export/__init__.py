"""Conversion of models and LoRAs between formats."""
