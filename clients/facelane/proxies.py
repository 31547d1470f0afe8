"""Which targets stay on this machine, and which variable sends the others by an HTTP proxy.

gRPC asks the environment by itself, also for its own machine, and reads less of ``no_proxy`` than
curl and browsers do: where this module names no variable, gRPC is told to ask for none.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
from urllib.parse import urlsplit


def _host(target: str) -> str:
    """The host of a gRPC target: ``host:port``, ``dns:///host``, ``ipv6:[::1]:1``, ``::1``."""
    rest = re.sub(r"^(?:dns|ipv4|ipv6):(?://[^/]*/)?", "", target)
    bracketed = re.match(r"\[([^]]*)\]", rest)
    if bracketed:
        return bracketed[1]
    return rest if rest.count(":") > 1 else rest.partition(":")[0]


def is_local(target: str) -> bool:
    """Whether what goes there stays on this machine."""
    if target.startswith(("unix:", "unix-abstract:", "vsock:")):
        return True
    if "," in target:
        scheme, _, several = target.partition(":")
        return all(is_local(f"{scheme}:{one}") for one in several.split(","))
    host = _host(target).rstrip(".").lower()
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None) or address
    return mapped.is_loopback or mapped.is_unspecified


def proxy_variable(target: str) -> str:
    """Which variable of the environment sends gRPC by a proxy, in its own order; empty = none."""
    variable = next(
        (name for name in ("grpc_proxy", "https_proxy", "http_proxy") if os.environ.get(name)), ""
    )
    told = map(os.environ.get, ("no_grpc_proxy", "no_proxy", "NO_PROXY"))
    names = re.split(r"[,\s]+", next(filter(None, told), ""))
    return "" if any(_exempts(name, _host(target)) for name in names if name) else variable


def http_proxy(url: str) -> str:
    """The proxy by which the environment sends what goes to this HTTP address; empty = none, also
    for what is no address. ``HTTP_PROXY`` in capitals counts for nothing: a web server sets it from
    a header."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return ""
    host = parts.hostname or ""
    names = ["https_proxy", "HTTPS_PROXY"] if parts.scheme == "https" else ["http_proxy"]
    values = (os.environ.get(name) for name in (*names, "all_proxy", "ALL_PROXY"))
    found = next(filter(None, values), "")
    told = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    if is_local(f"[{host}]" if ":" in host else host):
        return ""
    if any(_exempts(name, host) for name in re.split(r"[,\s]+", told) if name):
        return ""
    return found if not found or "://" in found else f"http://{found}"


def _exempts(name: str, host: str) -> bool:
    """``host``, the end of one, ``*``, ``*.end``, ``host:port``, ``10.0.0.0/8``."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host) in ipaddress.ip_network(name, strict=False)
    if name.count(":") == 1:
        name = name.partition(":")[0]
    return host.endswith(name.removeprefix("*"))
