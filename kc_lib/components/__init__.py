"""What each head, MLP and neuron reads and writes: logit lens, direct logit attribution, attention, the circuit table."""
