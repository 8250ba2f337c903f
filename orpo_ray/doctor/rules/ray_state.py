"""Ray's version, token, dashboard and folder."""

import shlex
from collections.abc import Iterator
from pathlib import Path

from orpo_ray.doctor.facts import Asked, RayState
from orpo_ray.doctor.findings import Finding, ok, stops, warning
from orpo_ray.doctor.probes.ray_state import ASKS, NO_URL, OPEN, OTHER

SUBJECT = "Ray"

_SOCKET_LETTERS = 107
"""The longest path of a socket on Linux (sun_path, unix(7), without the closing zero)."""
_BELOW_FOLDER = len("/session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store")


def judge(asked: Asked, found: RayState) -> Iterator[Finding]:
    """Whether Ray can start here, and whether a cluster lets us in and keeps others out."""
    complaints = [*_token(found), *_dashboard(found), *_folder(found)]
    yield from complaints
    if not complaints:
        token = f"token in {found.token}" if found.token else "no token"
        yield ok(SUBJECT, f"{found.version}, {token}, {_said(found)}")


def _token(found: RayState) -> Iterator[Finding]:
    if found.token and found.token_problem:
        is_readable = "others" in found.token_problem
        quoted = shlex.quote(found.token)
        what = f"the token file {found.token}: {found.token_problem}"
        if is_readable:
            yield warning(SUBJECT, what, f"chmod 600 {quoted}")
        else:
            yield stops(SUBJECT, what, f"copy the cluster's token to {quoted}, and chmod 600 it")
    elif found.auth_mode == "token" and not found.token:
        yield stops(
            SUBJECT,
            "RAY_AUTH_MODE=token, but there is no token",
            "copy the cluster's token to ~/.ray/orpo-ray.token (chmod 600), and export "
            "RAY_AUTH_TOKEN_PATH=~/.ray/orpo-ray.token",
        )


def _dashboard(found: RayState) -> Iterator[Finding]:
    if found.answer == OPEN:
        yield warning(
            SUBJECT,
            f"the dashboard at {found.dashboard} answers without a token, so all who reach it may "
            "run code",
            "end that Ray, and start it with RAY_AUTH_MODE=token (orpo-ray cluster up does)",
        )
    elif found.answer == ASKS and not found.token:
        yield warning(
            SUBJECT,
            f"the dashboard at {found.dashboard} asks for a token, and there is none here",
            "copy the cluster's token to ~/.ray/orpo-ray.token, and chmod 600 it",
        )
    elif found.answer == NO_URL:
        yield warning(
            SUBJECT,
            f"RAY_API_SERVER_ADDRESS={found.dashboard} is no URL, so submit, status and logs reach "
            "no cluster",
            "export RAY_API_SERVER_ADDRESS=http://HOST:8265, or unset it",
        )
    elif found.answer == OTHER:
        yield warning(
            SUBJECT,
            f"{found.dashboard} answers, but not as Ray's dashboard does",
            "name the dashboard's URL: --address URL",
        )


def _folder(found: RayState) -> Iterator[Finding]:
    """A running Ray has its folder already, whose name was short enough."""
    longest = len(str(Path(found.folder).absolute())) + _BELOW_FOLDER
    if not found.is_running and longest > _SOCKET_LETTERS:
        yield stops(
            SUBJECT,
            f"the name of its folder {found.folder} is too long for its sockets",
            "export RAY_TMPDIR=/tmp",
        )


def _said(found: RayState) -> str:
    if found.is_running:
        return "a server of the cluster"
    if not found.answer:
        return "no dashboard answers; a run starts its own Ray"
    return f"the dashboard at {found.dashboard} asks for it"
