"""An HTTP server for one model folder and many patches, with OpenAI's routes and a page to try it.

This room knows nothing of graphs, slots or token ids: it hands requests to an open model and reads results. The extra
`serve` installs its packages.
"""

from .app import create_app
from .failures import Refusal, refusal_body
from .guard import Guard, body_not_whole, body_too_large
from .logs import log_as_json
from .patches import SUFFIX, ServedPatches, require_name
from .server import Server, new_server
from .settings import ServerSettings
from .watch import Mark, patch_files

__all__ = [
    "SUFFIX",
    "Guard",
    "Mark",
    "Refusal",
    "ServedPatches",
    "Server",
    "ServerSettings",
    "body_not_whole",
    "body_too_large",
    "create_app",
    "log_as_json",
    "new_server",
    "patch_files",
    "refusal_body",
    "require_name",
]
