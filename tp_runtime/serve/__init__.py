"""An HTTP server for one model folder and many patches, with OpenAI's routes and a page to try it.

This room knows nothing of graphs, slots or token ids: it hands requests to an open model and reads results. The extra
`serve` installs its packages.
"""

from .app import create_app
from .patches import PATCH_SUFFIX, ServedPatches, require_name
from .settings import ServerSettings

__all__ = ["PATCH_SUFFIX", "ServedPatches", "ServerSettings", "create_app", "require_name"]
