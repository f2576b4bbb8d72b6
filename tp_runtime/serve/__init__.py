"""An HTTP server for one model folder and many patches, with OpenAI's routes and a page to try it.

This room knows nothing of graphs, slots or token ids: it hands requests to an open model and reads results. The extra
`serve` installs its packages.
"""

from .app import create_app
from .settings import ServerSettings

__all__ = ["ServerSettings", "create_app"]
