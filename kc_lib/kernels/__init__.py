"""The computations everything else stands on: writer outputs, reader gradients, circuit runs, restarts from a layer."""
