"""Everything that touches torch: models, adapters, losses, the optimizer, sampling. No trio."""
