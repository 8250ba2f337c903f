"""Ray's version, its token and its dashboard. The token itself is never read into an answer."""

import http.client
import importlib.metadata
import json
import os
import stat
import urllib.error
import urllib.request
from pathlib import Path

from orpo_ray.doctor.facts import Asked, RayState
from orpo_ray.doctor.urls import is_web_url

_ANSWER_S = 3.0
_VARIABLE, _PATH, _MODE = "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"
_RAYS_OWN = "~/.ray/auth_token"
OPEN, ASKS, OTHER, NO_URL = "open", "asks for a token", "other", "no URL"


def look(asked: Asked) -> RayState:
    """What Ray and the commands for a cluster would find here."""
    token, problem = _token(asked.token_file)
    return RayState(
        version=importlib.metadata.version("ray"),
        folder=asked.ray_folder,
        auth_mode=os.environ.get(_MODE, ""),
        token=token,
        token_problem=problem,
        dashboard=asked.dashboard,
        is_running=asked.under_ray,
        answer=_answer(asked.dashboard) if asked.dashboard else "",
    )


def new_rays_folder() -> str:
    """Where a Ray that is started here keeps its files."""
    return str(Path(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp", "ray"))


def _token(ours: str) -> tuple[str, str]:
    """Where the token is, in Ray's order and then in ours, and what is wrong with its file."""
    if os.environ.get(_VARIABLE):
        return _VARIABLE, ""
    if named := os.environ.get(_PATH):
        return named, _wrong(Path(named))
    for place in (ours, _RAYS_OWN):
        if place and (file := Path(place).expanduser()).exists():
            return str(file), _wrong(file)
    return "", ""


def _wrong(file: Path) -> str:
    try:
        mode, size = file.stat().st_mode, len(file.read_bytes().strip())
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
    if not size:
        return "it is empty"
    return "others may read it" if mode & (stat.S_IRWXG | stat.S_IRWXO) else ""


def _answer(dashboard: str) -> str:
    """What answers at a dashboard's address without a token; no proxy is asked."""
    if not is_web_url(dashboard):
        return NO_URL
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{dashboard}/api/version", timeout=_ANSWER_S) as response:
            told = json.loads(response.read(2**16))
    except urllib.error.HTTPError as error:
        return ASKS if error.code in (401, 403) else OTHER
    except OSError:
        return ""
    except (ValueError, http.client.HTTPException):
        return OTHER
    return OPEN if isinstance(told, dict) and "ray_version" in told else OTHER
