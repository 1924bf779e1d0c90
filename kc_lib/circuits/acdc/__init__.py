"""ACDC (Conmy et al. 2023): edges tested and removed one by one, exactly, by a search that runs only what changes."""
