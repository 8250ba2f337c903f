"""What the checks of a run itself say of a server before the run starts."""

from collections.abc import Iterator

from orpo_ray.doctor.facts import Asked, Settings
from orpo_ray.doctor.findings import Finding, ok, stops

SUBJECT = "settings"


def judge(asked: Asked, found: Settings, *, cluster_has_gpus: bool) -> Iterator[Finding]:
    """Whether the server has what the optimizer, the trackers, the dtype and the attention need.

    A message of a check says what is wrong, and what to do after a semicolon.
    """
    takes_no_worker = cluster_has_gpus and not found.has_gpu
    wrong = found.missing if takes_no_worker else (*found.missing, *found.unfit)
    for problem in wrong:
        what, _, fix = problem.partition("; ")
        yield stops(SUBJECT, what, fix)
    if not wrong:
        yield ok(SUBJECT, "optimizer, trackers, dtype and attention have what they need")
