"""Where the chief can be reached: the addresses it offers, and the order in which a rank tries them."""

import ipaddress
import os
import socket

import psutil

VARIABLE = "DISTFIT_WATCH_ADDRESS"


def offered() -> list[str]:
    """The addresses of this host, IPv4 first, loopback last; `DISTFIT_WATCH_ADDRESS` (comma separated
    addresses or host names) replaces them where a cluster lets ranks talk over one network only."""
    override = os.environ.get(VARIABLE, "")
    if override.strip():
        return [address.strip() for address in override.split(",") if address.strip()]
    up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    found = [
        ipaddress.ip_address(entry.address.split("%")[0])
        for name, entries in psutil.net_if_addrs().items()
        for entry in entries
        if entry.family in (socket.AF_INET, socket.AF_INET6) and name in up
    ]
    # A link-local IPv6 address means nothing without the other side's interface number.
    usable = {address for address in found if not (address.version == 6 and address.is_link_local)}
    return [str(address) for address in sorted(usable, key=lambda a: (a.is_loopback, a.version, int(a)))]


def in_order(addresses: list[str], same_host: bool) -> list[str]:
    """The order to try: loopback first on the chief's own host, last elsewhere.

    >>> in_order(["10.0.0.7", "127.0.0.1"], same_host=True)
    ['127.0.0.1', '10.0.0.7']
    >>> in_order(["10.0.0.7", "127.0.0.1"], same_host=False)
    ['10.0.0.7', '127.0.0.1']
    """
    return sorted(addresses, key=lambda address: _is_loopback(address) != same_host)


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:  # a host name from DISTFIT_WATCH_ADDRESS
        return False
