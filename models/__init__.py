"""Google's Vision Transformers: configurations, forward pass, checkpoints. Imports nothing of `utils/`."""
