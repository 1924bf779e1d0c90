"""Facts and prompts as clean/corrupted token pairs with named positions, for one model."""
