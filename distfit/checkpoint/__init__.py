"""What a training keeps, and goes on from: docs/guides/checkpoints.md."""
