"""The manifests of the base models, imported as tp_export.manifests.

A manifest records where the weights come from and their digests.
"""
