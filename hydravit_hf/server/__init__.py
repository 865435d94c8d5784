"""The HTTP server of `hydravit serve`: images come in, labels go out, and each request has a deadline.

It is one process. The event loop reads requests, a few threads decode images, and the thread of the `Engine` runs the
model. So nothing is left behind when the process is killed.
"""

from .process import bind, serve
from .requests import Limits
from .service import Service

__all__ = ["Limits", "Service", "bind", "serve"]
