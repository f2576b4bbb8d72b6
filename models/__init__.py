"""Base-model manifests, imported as tp_export.manifests: where the weights come from and their digests."""
