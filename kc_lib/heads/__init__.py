"""What kind each head is: published head scores, relation heads and movers, path patching, ablation."""
