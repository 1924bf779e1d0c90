"""Loading any model TransformerLens boots, and the models that need no hub."""
