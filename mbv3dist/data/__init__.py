"""From shards on disk to batches: index -> plan -> reader -> view -> decode -> batch buffer."""
