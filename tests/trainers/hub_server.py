"""A stand-in for the Hugging Face Hub on this machine: the routes that an upload uses."""

import base64
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

TOKEN = "hf_secret"


class Hub:
    """A server and what it holds.

    Attributes:
        repos: by name, whether it is private.
        files: of the last commit, by repository and path.
        refuse: routes (a part of the path) that answer with this status.
        role: what the token may do.
    """

    def __init__(self):
        self.repos: dict[str, bool] = {}
        self.files: dict[str, dict[str, bytes]] = {}
        self.messages: list[str] = []
        self.objects: dict[str, bytes] = {}
        self.refuse: dict[str, int] = {}
        self.role = "write"
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Routes", (Routes,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        Thread(target=self.server.serve_forever, daemon=True).start()


class Routes(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *args):
        """Says nothing."""

    def answer(self, value, status: int = 200):
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def handle_request(self):
        data = self.body()
        path = self.path.partition("?")[0].strip("/")
        for route, status in self.hub.refuse.items():
            if route in path:
                return self.answer({"error": "the server says no"}, status)
        if not path.startswith("objects/") and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer({"error": "Invalid credentials"}, 401)
        match path.split("/"):
            case ["api", "whoami-v2"]:
                self.answer({"type": "user", "name": "me", "auth": {"accessToken": {"role": self.hub.role}}})
            case ["api", "validate-yaml"]:
                self.answer({"errors": [], "warnings": []})
            case ["api", "repos", "create"]:
                self.create(json.loads(data))
            case ["api", "models", org, name] if f"{org}/{name}" in self.hub.repos:
                private = self.hub.repos[f"{org}/{name}"]
                self.answer({"id": f"{org}/{name}", "private": private, "siblings": [], "tags": []})
            case ["api", "models", _, _, "preupload", "main"]:
                files = [file["path"] for file in json.loads(data)["files"]]
                modes = {path: "lfs" if path.endswith(".safetensors") else "regular" for path in files}
                told = [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes.items()]
                self.answer({"files": told})
            case [_, _, "info", "lfs", "objects", "batch"]:
                self.answer({"transfer": "basic", "objects": list(map(self.upload_of, json.loads(data)["objects"]))})
            case ["objects", oid]:
                self.hub.objects[oid] = data
                self.answer({})
            case ["api", "models", org, name, "commit", "main"]:
                self.commit(f"{org}/{name}", [json.loads(line) for line in data.splitlines()])
            case _:
                self.answer({"error": f"no route {path}"}, 404)

    do_GET = do_POST = do_PUT = handle_request

    def create(self, asked: dict):
        name = f"{asked['organization']}/{asked['name']}"
        status = 409 if name in self.hub.repos else 200
        self.hub.repos.setdefault(name, asked.get("visibility") == "private")
        self.answer({"url": f"{self.hub.url}/{name}", "name": name, "id": name}, status)

    def upload_of(self, wanted: dict) -> dict:
        return wanted | {"actions": {"upload": {"href": f"{self.hub.url}/objects/{wanted['oid']}"}}}

    def commit(self, repo: str, operations: list[dict]):
        files = {}
        for operation in operations:
            value = operation["value"]
            match operation["key"]:
                case "header":
                    self.hub.messages.append(value["summary"])
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    files[value["path"]] = self.hub.objects[value["oid"]]
        self.hub.files[repo] = files
        self.answer({"commitUrl": f"{self.hub.url}/{repo}/commit/1", "commitOid": "1" * 40, "success": True})
