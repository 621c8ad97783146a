"""The parts of pretrain_tiny.py, none importing a later: noto, captions, fit, vae, base, export."""
