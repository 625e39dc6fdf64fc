"""Where our servers listen."""

import ipaddress
import socket

from coati.errors import UserError


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address or name."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens, with port 0 on a free port.

    Raises:
        UserError: the address isn't this machine's, or the port is taken or no port.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        raise UserError(f"can't listen on {host}, port {port} ({error}): choose another --port or --host") from None
