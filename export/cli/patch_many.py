"""`tp-export patch --prompts DIR`: a patch for every prompt file of a folder, one after the other or on Ray.

Each patch is what `tp-export patch` makes of its prompt, and appears whole or not at all. So a run that was interrupted
goes on where it stopped: a prompt whose patch is there already, for this base and this text, is skipped.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from copy import copy
from io import StringIO
from pathlib import Path

from tp_runtime.errors import CalibrationError, TPError

from .options import read_prompt_file

_PROMPT = ".txt"
_OWN = {"queries": ".queries.jsonl", "held_out": ".held-out.jsonl"}  # files of a prompt's own, beside it

One = Callable[[argparse.Namespace], int]


def add_many_options(parser: argparse.ArgumentParser) -> None:
    """Add --prompts and --ray to a parser."""
    group = parser.add_argument_group("many patches")
    group.add_argument(
        "--prompts",
        type=Path,
        metavar="DIR",
        help="fit a patch for every NAME.txt of DIR; OUT is then a folder, which gets NAME.safetensors. "
        "NAME.queries.jsonl and NAME.held-out.jsonl beside it stand for --queries and --held-out. Patches that are "
        "there already, for this base and text, are kept",
    )
    group.add_argument(
        "--ray",
        nargs="?",
        const="local",
        metavar="ADDRESS",
        help="with --prompts: fit them as tasks on Ray, on this machine or on the cluster at ADDRESS, whose machines "
        "see the same folders",
    )
    group.add_argument(
        "--cpus-per-fit", type=float, default=1.0, metavar="N", help="with --ray: the CPUs of a task (default 1)"
    )


def run_many(args: argparse.Namespace, fit: One) -> int:
    """Fit a patch for every prompt, and print the path of each one that is there in the end.

    Args:
        args: the arguments of the command.
        fit: fits one patch, given the arguments of one.

    Returns:
        0 if every prompt has its patch, otherwise 2. What a prompt failed with is on stderr.

    Raises:
        CalibrationError: the options contradict each other, or the folder holds no prompts.
    """
    from ..progress import bar
    from ..source import open_source

    jobs = _jobs(args)
    digest = open_source(args.src).digest if any(job.out.exists() for job in jobs) else ""
    todo = [job for job in jobs if not _is_done(job, digest)]
    if len(todo) < len(jobs):
        kept = f"{len(jobs) - len(todo)} of {len(jobs)} patches are there already, whatever their other options were"
        print(f"note: {kept}; delete those that you want anew", file=sys.stderr)
    failures: dict[str, str] = {}
    with bar("patches", len(jobs), "patch") as shown, _runner(args, fit) as run:
        shown.update(len(jobs) - len(todo))
        for job, problem in run(todo):
            if problem is not None:
                failures[job.name] = problem
            shown.update()
    for job in jobs:
        if job.name not in failures:
            print(job.out)
    for name, problem in failures.items():
        print(f"error: {name}: {problem}", file=sys.stderr)
    return 2 if failures else 0


def _jobs(args: argparse.Namespace) -> list[argparse.Namespace]:
    """Return the arguments of each patch, in the order of their names."""
    for option in ("prompt", "prompt_file", "name", "save_queries", "rollouts"):
        if getattr(args, option) is not None:
            raise CalibrationError(
                "the option is for one patch",
                field="--" + option.replace("_", "-"),
                got=getattr(args, option),
                wanted="nothing beside --prompts",
            )
    for field, path in (("--prompts", args.prompts), ("OUT", args.out)):
        if not path.is_dir():
            raise CalibrationError("the path is not a folder", field=field, got=str(path), wanted="a folder")
    prompts = sorted(path for path in args.prompts.glob(f"*{_PROMPT}") if path.is_file())
    if not prompts:
        problem = "the folder holds no prompts"
        raise CalibrationError(problem, field="--prompts", got=str(args.prompts), wanted="files NAME.txt")
    jobs = []
    for path in prompts:
        job = copy(args)
        job.prompts, job.ray = None, None
        # Paths are absolute, because a task on Ray runs in another folder.
        job.name, job.prompt_file = path.stem, path.resolve()
        job.out = args.out.resolve() / f"{path.stem}.safetensors"
        if Path(args.src).is_dir():
            job.src = str(Path(args.src).resolve())
        if args.system_messages is not None:
            job.system_messages = args.system_messages.resolve()
        for option, suffix in _OWN.items():
            own, shared = path.with_name(path.stem + suffix), getattr(args, option)
            if own.is_file():
                setattr(job, option, own.resolve())
            elif shared is not None:
                setattr(job, option, shared.resolve())
        jobs.append(job)
    return jobs


def _is_done(job: argparse.Namespace, base_digest: str) -> bool:
    """Return whether the patch of this prompt, text and base is there already."""
    from tp_runtime.patch import Patch, context_digest

    if not job.out.exists():
        return False
    try:
        config = Patch.load(job.out).config
        text = read_prompt_file(job.prompt_file)
    except TPError:
        return False  # the fit says what is wrong with the file, or replaces it
    return config.context_digest == context_digest(text) and config.base_digest == base_digest


Run = Callable[[Sequence[argparse.Namespace]], Iterator[tuple[argparse.Namespace, str | None]]]


@contextmanager
def _runner(args: argparse.Namespace, fit: One) -> Iterator[Run]:
    """Yield a function that fits patches and yields each with its problem, in the order in which they end."""
    if args.ray is None:

        def in_turn(jobs: Sequence[argparse.Namespace]) -> Iterator[tuple[argparse.Namespace, str | None]]:
            for job in jobs:
                yield job, _problem(fit, job)

        yield in_turn
        return
    try:
        import ray
    except ImportError as error:
        raise CalibrationError(
            "the package ray is not installed", field="--ray", got=str(error), fix='run: pip install "tp-runtime[ray]"'
        ) from error
    own = not ray.is_initialized()
    if own:
        address = None if args.ray == "local" else args.ray
        ray.init(address=address, include_dashboard=False, log_to_driver=False, configure_logging=False)

    def on_ray(jobs: Sequence[argparse.Namespace]) -> Iterator[tuple[argparse.Namespace, str | None]]:
        task = ray.remote(num_cpus=args.cpus_per_fit, max_retries=2)(_problem)
        running = {task.remote(fit, job): job for job in jobs}
        try:
            while running:
                (done,), _waiting = ray.wait(list(running))
                job = running.pop(done)
                try:
                    yield job, ray.get(done)
                except ray.exceptions.RayError as error:  # the worker was lost, also after further tries
                    yield job, f"{type(error).__name__}: the task was lost"
        finally:
            for reference in running:
                ray.cancel(reference)

    try:
        yield on_ray
    finally:
        if own:
            ray.shutdown()


def _problem(fit: One, job: argparse.Namespace) -> str | None:
    """Fit one patch; return what is wrong, or None."""
    try:
        with redirect_stdout(StringIO()):  # the paths are printed at the end, in order
            fit(job)
    except (TPError, OSError) as error:
        return str(error)
    except Exception as error:  # one prompt for which torch has no memory, say, does not end the others
        return f"{type(error).__name__}: {error}"
    return None
