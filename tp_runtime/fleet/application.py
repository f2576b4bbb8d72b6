"""The Ray Serve application: an ingress, and the replicas behind it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve import Application

from ..errors import RequestError, require_positive, shown
from ..serve import ServerSettings
from .ingress import Ingress
from .replica import replica_class

_SPARE_REQUESTS = 64  # beside those that replicas run: pages, metrics, and bodies that arrive


def app(
    model_dir: str | Path,
    patches: str | Path,
    *,
    name: str | None = None,
    replicas: tuple[int, int] = (1, 2),
    cpus: float = 1.0,
    gpus: float = 0.0,
    patches_per_replica: int = 16,
    tries: int = 4,
    settings: ServerSettings | None = None,
    autoscaling: dict[str, Any] | None = None,
    **options: Any,
) -> Application:
    """Return an application for `serve.run`, with the routes of `tp-runtime serve`.

    Args:
        model_dir: the exported folder, on every machine that runs a replica.
        patches: the folder of the patch files, on every such machine; a new or changed file needs no restart.
        name: the name of the model in requests; None takes that of its base model.
        replicas: the smallest and the largest number of replicas; with a smallest number of 0, an idle fleet has none.
        cpus: the CPUs that Ray counts for a replica, which may be a fraction; `threads` decides what it really uses.
        gpus: the GPUs that Ray counts for a replica, which may be a fraction.
        patches_per_replica: the largest number of patches that a replica holds.
        tries: how often a request is handed to a replica before it fails.
        settings: what the replicas accept; `host`, `port` and `patch_dir` have no effect.
        autoscaling: more of Ray Serve's autoscaling_config, such as {"target_ongoing_requests": 4}.
        options: the arguments of PatchedModel.from_pretrained, such as `device` and `threads`.

    Raises:
        RequestError: a value is not valid.
    """
    least, most = replicas
    require_positive("replicas[1]", most)
    if isinstance(least, bool) or not isinstance(least, int) or not 0 <= least <= most:
        raise RequestError(
            "the number of replicas is not valid", field="replicas", got=shown(replicas), wanted="(0, 1) up"
        )
    require_positive("patches_per_replica", patches_per_replica)
    require_positive("tries", tries)
    for field, path in (("model_dir", model_dir), ("patches", patches)):
        if not Path(path).is_dir():
            raise RequestError("the path is not a folder", field=field, got=str(path), wanted="a folder")
    accepted = replace(settings or ServerSettings(), host="127.0.0.1", patch_dir=None, manage_patches=False)
    at_once = accepted.rows + accepted.queue
    deployment = serve.deployment(
        name="Replica",
        autoscaling_config={"min_replicas": least, "max_replicas": most, **(autoscaling or {})},
        ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
        max_ongoing_requests=at_once,
        max_queued_requests=accepted.queue,
        graceful_shutdown_timeout_s=accepted.drain,
    )
    folder, files = str(Path(model_dir).resolve()), str(Path(patches).resolve())
    behind = deployment(replica_class(patches_per_replica)).bind(folder, files, name, accepted, options)
    front = Ingress.options(  # type: ignore[attr-defined]
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=most * at_once + _SPARE_REQUESTS,  # Ray's own default is 5
        max_queued_requests=accepted.queue,
    )
    return front.bind(behind, tries, accepted)  # type: ignore[no-any-return]
