"""`coati serve`: models behind OpenAI's API."""

import argparse
import asyncio
import os
import signal
import socket
import threading
from contextlib import contextmanager

from coati.errors import UserError
from coati.listening import is_loopback, listen
from coati.run_layout import model_folder, named_models

DTYPES = ("auto", "float32", "bfloat16", "float16")
TOKEN = "COATI_TOKEN"
MAX_QUEUE, MAX_BODY = 256, 4 * 2**20
POLL_SECONDS = 0.05  # between looks at whether a draining server is done


def add_arguments(parser: argparse.ArgumentParser):
    parser.add_argument(
        "models", nargs="+", metavar="[NAME=]MODEL", help="a model's folder, an adapter's, a run's or a checkpoint's"
    )
    parser.add_argument("--engine", choices=("coati", "vllm"), default="coati", help="who generates (default: coati)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, default=8000, help="0 for any that is free (default: 8000)")
    parser.add_argument("--token", help=f"that clients must send as their API key (default: ${TOKEN})")
    parser.add_argument("--slots", type=int, default=64, help="responses generated together, per model (default: 64)")
    parser.add_argument("--max_queue", type=int, help=f"choices that may wait for a slot (default: {MAX_QUEUE})")
    parser.add_argument(
        "--max_length",
        type=int,
        help="longest prompt with its response, in tokens (default: the model's, at most 4096)",
    )
    parser.add_argument("--max_body", type=int, help="bytes of a request (default: 4 MiB)")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="float32 on a CPU, else that of the files")


def check_address(host: str, token: str | None):
    """Raises a UserError for a server without a token that others could reach."""
    if not token and not is_loopback(host):
        raise UserError(f"--host {host} can be reached from other machines: set {TOKEN} or give --token")


def open_worker(name: str, path: str, options: argparse.Namespace):
    """A worker that has started, of the model that a path names.

    Args:
        options: `dtype`, `slots`, `max_queue` and `max_length`.

    Raises:
        UserError: it can't be opened.
    """
    folder = model_folder(path)
    import torch

    from coati.models.opened import open_model
    from coati.serve.worker import Worker

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = None if options.dtype == "auto" else getattr(torch, options.dtype)
    if options.dtype == "auto" and device.type == "cpu":
        dtype = torch.float32
    opened = open_model(folder, dtype, device)
    worker = Worker(name, opened, options.slots, options.max_queue, options.max_length)
    worker.start()
    return worker


def serve(options: argparse.Namespace) -> int:
    """Serves until SIGTERM or Ctrl-C, finishes what was begun, and returns 0.

    Raises:
        UserError: a model that can't be opened, or an address that can't be served.
    """
    paths = named_models(options.models)
    token = options.token if options.token is not None else os.environ.get(TOKEN)
    check_address(options.host, token)
    for name, least in (("slots", 1), ("max_queue", 0), ("max_body", 1), ("max_length", 2)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise UserError(f"--{name} {value} is below {least}")
    folders = {name: model_folder(path) for name, path in paths.items()}
    if options.engine == "vllm":
        from coati.serve.vllm import become_server

        become_server(folders, options, token)
    options.max_queue = MAX_QUEUE if options.max_queue is None else options.max_queue
    max_body = MAX_BODY if options.max_body is None else options.max_body
    listener = listen(options.host, options.port)
    with listener:
        from coati.serve.application import Service, application

        workers = {name: open_worker(name, path, options) for name, path in paths.items()}
        service = Service(workers, max_body)
        for worker in workers.values():
            for note in worker.notes:
                print(f"{worker.name}: {note}", flush=True)
        host, port = listener.getsockname()[:2]
        place = f"[{host}]" if ":" in host else host
        print(f"serving {', '.join(workers)} at http://{place}:{port}/v1", flush=True)
        run(application(service, token), service, listener)
    return 0


def run(app, service, listener: socket.socket):
    """Runs an application until it was told to stop and has drained.

    Args:
        service: has `draining`, `open` requests and `close`.
    """
    import uvicorn

    class Server(uvicorn.Server):
        """uvicorn, but the first signal lets requests end, and refuses others meanwhile; the second stops at once."""

        @contextmanager
        def capture_signals(self):
            loop = asyncio.get_running_loop()
            kinds = (signal.SIGTERM, signal.SIGINT) if threading.current_thread() is threading.main_thread() else ()
            for kind in kinds:
                loop.add_signal_handler(kind, self.on_signal)
            try:
                yield
            finally:
                for kind in kinds:
                    loop.remove_signal_handler(kind)

        def on_signal(self):
            if service.draining:
                self.should_exit = self.force_exit = True
                return
            service.draining = True
            self.drained = asyncio.ensure_future(self.drain())

        async def drain(self):
            while service.open:
                await asyncio.sleep(POLL_SECONDS)
            service.close()
            self.should_exit = True

    Server(uvicorn.Config(app, log_level="warning", access_log=False)).run([listener])
