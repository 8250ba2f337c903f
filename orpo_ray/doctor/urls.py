"""Whether a text can be the URL of a server."""

from urllib.parse import urlsplit


def is_web_url(text: str) -> bool:
    """Whether it names a host for HTTP or HTTPS. Nothing is connected."""
    try:
        parts = urlsplit(text)
        has_host = bool(parts.hostname) and parts.port != 0
    except ValueError:  # brackets or a port that are none
        return False
    return parts.scheme in ("http", "https") and has_host
