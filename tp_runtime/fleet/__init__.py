"""Many replicas of the server on Ray Serve: each holds the model, and Ray spreads the patches over them.

This room knows nothing of batches, sampling or what an answer looks like: every request goes through the application
of the room serve, in a replica that Ray chose. The extra `ray` installs its packages.
"""

from .application import app

__all__ = ["app"]
