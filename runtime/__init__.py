"""The ground under every node: clock, randomness, ids, files, network, logs; see `runtime.model` for the five seams."""
