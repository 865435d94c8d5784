"""A Hub on loopback: what `huggingface_hub` asks of huggingface.co to publish and to load a model.

Repositories live in memory. As on the Hub, a commit is one step; large files go to a storage host of their own (the
same server under its other name), where only their hash is asked for; and whoever may not read a repository can't tell
it from one that doesn't exist. `python tests/support/hub_server.py` serves until it is interrupted.
"""

import base64
import hashlib
import json
import math
import re
import socket
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from urllib.parse import unquote, urlsplit

import yaml

LICENSES = """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
    afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
    cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl
    lgpl-2.1 lgpl-3.0 isc lppl-1.3c ms-pl mpl-2.0 odc-by odbl openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib
    pddl lgpl-lr deepfloyd-if-license llama2 gemma unknown other
"""
TASKS = ["image-classification", "image-feature-extraction", "image-segmentation", "object-detection"]  # of vision
REPO_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
FIELDS = {  # what each value of a field of a card must be
    "license": re.compile("|".join(map(re.escape, LICENSES.split()))),
    "datasets": REPO_ID,
    "base_model": REPO_ID,
    "tags": re.compile(".+"),
    "metrics": re.compile(".+"),
    "library_name": re.compile(".+"),
}
CHUNK = 2**16  # bytes of an answer that are sent at once
LARGE = {".safetensors", ".png", ".bin", ".pt"}
ATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in sorted(LARGE)).encode()


def is_large(path: str, size: int) -> bool:
    return PurePosixPath(path).suffix in LARGE or size > 10 * 2**20


def object_id(path: str, data: bytes) -> str:
    """The ETag of a file: git's hash of it, or the sha256 of a large one."""
    if is_large(path, len(data)):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0%b" % (len(data), data)).hexdigest()


class Refusal(Exception):
    """An answer other than the one that was asked for."""

    def __init__(self, status: int, message: str, code: str | None = None, **values):
        self.status, self.values = status, {"error": message} | values
        self.headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})


@dataclass
class Repo:
    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)  # of all branches, the oldest first
    branches: dict[str, str] = field(default_factory=lambda: {"main": ""})

    def commit(self, branch: str, files: dict[str, bytes | None]) -> str:
        """None deletes a file."""
        sha = hashlib.sha1(f"{branch} {len(self.commits)}".encode()).hexdigest()
        after = self.commits.get(self.branches[branch], {}) | files
        self.commits[sha] = {path: data for path, data in after.items() if data is not None}
        self.branches[branch] = sha
        return sha

    def resolve(self, revision: str) -> str:
        sha = self.branches.get(revision, revision)
        if sha not in self.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.resolve(revision)]


@dataclass
class Request:
    method: str
    path: str
    body: bytes
    user: str | None

    @property
    def json(self) -> dict:
        return json.loads(self.body)


@dataclass
class Reply:
    body: bytes | dict | list = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


ENDPOINTS: list[tuple[str, re.Pattern, Callable[..., Reply]]] = []


def endpoint(method: str, path: str):
    """Serves a path with {placeholders}: a {repo} is two parts of it, a {path} the rest."""
    pattern = path.replace("{repo}", "(?P<repo>[^/]+/[^/]+)").replace("{path}", "(?P<path>.+)")
    pattern = re.compile(re.sub(r"\{(\w+)\}", r"(?P<\1>[^/]+)", pattern))

    def register(function):
        ENDPOINTS.append((method, pattern, function))
        return function

    return register


class HubServer:
    """A Hub whose users are those of `tokens`.

    `log` holds each request's method and path (without its query), and `sent` the bytes of each answer, in the same
    order. The connections share a link of `rate` bytes per second, or an unlimited one.
    """

    def __init__(self, tokens: dict[str, str] | None = None, port: int = 0, rate: float = math.inf):
        self.tokens = {"hf_token": "user"} if tokens is None else tokens
        self.repos: dict[str, Repo] = {}
        self.storage: dict[str, bytes] = {}
        self.log: list[tuple[str, str]] = []
        self.sent: list[int] = []
        self.rate, self.free_at = rate, 0.0
        self.faults: list[dict] = []
        self.connections: set[socket.socket] = set()
        self.lock = threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.server.hub = self
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.storage_url = f"http://localhost:{self.server.server_port}/storage"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()
        for connection in list(self.connections):  # clients keep theirs open
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    @contextmanager
    def fail(self, matches: Callable[[str, str], bool], how: int | str | Callable, times: float = math.inf):
        """Answers what matches with a status, cuts it ("cut") in the middle, or calls a function before it answers."""
        fault = {"matches": matches, "how": how, "times": times}
        self.faults.append(fault)
        try:
            yield fault
        finally:
            self.faults.remove(fault)

    def fault(self, method: str, path: str) -> int | str | None:
        with self.lock:
            for fault in self.faults:
                if fault["times"] > 0 and fault["matches"](method, path):
                    fault["times"] -= 1
                    return fault["how"]

    def store(self, repo: Repo):
        """Put the large files of a repository that was not pushed into the storage."""
        for files in repo.commits.values():
            self.storage |= {object_id(path, data): data for path, data in files.items() if is_large(path, len(data))}

    def wait_for_link(self, size: int):
        """Wait until the link has carried so many bytes more."""
        with self.lock:
            self.free_at = max(self.free_at, time.monotonic()) + size / self.rate
            wait = self.free_at - time.monotonic()
        if wait > 0:
            time.sleep(wait)

    def bytes_sent(self, part: str = "", start: int = 0) -> int:
        """The bytes of the answers from the request number `start` on whose path has this part."""
        logged = zip(self.log[start:], self.sent[start:], strict=True)
        return sum(size for (_, path), size in logged if part in path)

    def answer(self, request: Request) -> Reply:
        for method, pattern, function in ENDPOINTS:
            if method == request.method and (match := pattern.fullmatch(request.path)):
                with self.lock:
                    return function(self, request, **{name: unquote(part) for name, part in match.groupdict().items()})
        raise Refusal(404, f"No such endpoint: {request.method} {request.path}")

    def readable(self, request: Request, name: str) -> Repo:
        repo = self.repos.get(name)
        if repo is None or (repo.private and request.user != name.partition("/")[0]):
            status = 401 if request.user is None else 404
            raise Refusal(status, "Repository not found", "RepoNotFound")
        return repo

    def writable(self, request: Request, name: str) -> Repo:
        repo = self.readable(request, name)
        if request.user != name.partition("/")[0]:
            raise Refusal(403 if request.user else 401, "You don't have the rights to write to this repository")
        return repo

    @endpoint("GET", "/api/whoami-v2")
    def whoami(self, request):
        if request.user is None:
            raise Refusal(401, "Invalid username or password.")
        return Reply({"type": "user", "name": request.user, "orgs": [], "auth": {"type": "access_token"}})

    @endpoint("POST", "/api/repos/create")
    def create(self, request):
        if request.user is None:
            raise Refusal(401, "Invalid username or password.")
        owner = request.json.get("organization") or request.user
        if owner != request.user:
            raise Refusal(403, f'You don\'t have the rights to create a model under the namespace "{owner}"')
        name = f"{owner}/{request.json['name']}"
        if name in self.repos:
            raise Refusal(409, "You already created this model repo", url=f"{self.url}/{name}")
        self.repos[name] = Repo(private=request.json.get("visibility") == "private")
        self.repos[name].commit("main", {".gitattributes": ATTRIBUTES})
        return Reply({"url": f"{self.url}/{name}", "name": name})

    @endpoint("POST", "/api/validate-yaml")
    def validate(self, request):
        error, warning = check_card(request.json["content"])
        texts = {"errors": error, "warnings": warning}
        messages = {key: [{"message": text}] if text else [] for key, text in texts.items()}
        return Reply(messages, status=400 if error else 200)

    @endpoint("GET", "/api/models/{repo}")
    def info(self, request, repo, revision="main"):
        found = self.readable(request, repo)
        files = [{"rfilename": path} for path in sorted(found.files(revision))]
        sha = found.resolve(revision)
        return Reply({"id": repo, "modelId": repo, "sha": sha, "private": found.private, "siblings": files, "tags": []})

    @endpoint("GET", "/api/models/{repo}/revision/{revision}")
    def revision_info(self, request, repo, revision):
        return self.info(request, repo, revision)

    @endpoint("GET", "/api/models/{repo}/tree/{revision}")
    def tree(self, request, repo, revision):
        files = self.readable(request, repo).files(revision)
        return Reply(
            [
                {"type": "file", "path": path, "size": len(data), "oid": object_id(path, data)}
                for path, data in sorted(files.items())
            ]
        )

    @endpoint("POST", "/api/models/{repo}/branch/{branch}")
    def branch(self, request, repo, branch):
        found = self.writable(request, repo)
        if branch in found.branches:
            raise Refusal(409, f"Reference already exists: {branch}")
        found.branches[branch] = found.resolve(request.json.get("startingPoint", "main"))
        return Reply({}, status=201)

    @endpoint("POST", "/api/models/{repo}/preupload/{revision}")
    def preupload(self, request, repo, revision):
        files = self.writable(request, repo).files(revision)
        modes = []
        for file in request.json["files"]:
            path = file["path"]
            mode = {"path": path, "uploadMode": "lfs" if is_large(path, file["size"]) else "regular"}
            modes.append(mode | {"shouldIgnore": False, "oid": object_id(path, files[path]) if path in files else None})
        return Reply({"files": modes})

    @endpoint("POST", "/{repo}.git/info/lfs/objects/batch")
    def batch(self, request, repo):
        self.writable(request, repo)
        objects = []
        for item in request.json["objects"]:
            upload = {"href": f"{self.storage_url}/{item['oid']}"}
            verify = {"href": f"{self.url}/{repo}.git/info/lfs/objects/verify"}
            actions = {} if item["oid"] in self.storage else {"actions": {"upload": upload, "verify": verify}}
            objects.append({"oid": item["oid"], "size": item["size"]} | actions)
        return Reply({"transfer": "basic", "objects": objects})

    @endpoint("PUT", "/storage/{oid}")
    def upload(self, request, oid):
        if hashlib.sha256(request.body).hexdigest() != oid:
            raise Refusal(400, "The content does not have this sha256")
        self.storage[oid] = request.body
        return Reply()

    @endpoint("POST", "/{repo}.git/info/lfs/objects/verify")
    def verify(self, request, repo):
        self.writable(request, repo)
        oid, size = request.json["oid"], request.json["size"]
        if len(self.storage.get(oid, b"")) != size:
            raise Refusal(404, f"There is no object {oid} of {size} bytes")
        return Reply({})

    @endpoint("POST", "/api/models/{repo}/commit/{branch}")
    def commit(self, request, repo, branch):
        found = self.writable(request, repo)
        if branch not in found.branches:
            raise Refusal(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        header, *operations = (json.loads(line) for line in request.body.splitlines())
        if header["key"] != "header" or not header["value"]["summary"]:
            raise Refusal(400, "A commit starts with its header")
        files = {}
        for operation in operations:
            key, value = operation["key"], operation["value"]
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"], validate=True)
            elif key == "lfsFile" and value["oid"] in self.storage:
                files[value["path"]] = self.storage[value["oid"]]
            elif key == "deletedFile" and value["path"] in found.files(branch):
                files[value["path"]] = None
            else:
                raise Refusal(400, f"Can't commit the {key} '{value['path']}': it was not uploaded or is not supported")
        sha = found.commit(branch, files)
        return Reply({"success": True, "commitUrl": f"{self.url}/{repo}/commit/{sha}", "commitOid": sha})

    @endpoint("HEAD", "/{repo}/resolve/{revision}/{path}")
    @endpoint("GET", "/{repo}/resolve/{revision}/{path}")
    def resolve(self, request, repo, revision, path):
        found = self.readable(request, repo)
        commit = {"X-Repo-Commit": found.resolve(revision)}
        if path not in found.files(revision):
            refusal = Refusal(404, "Entry not found", "EntryNotFound")
            refusal.headers |= commit
            raise refusal
        data = found.files(revision)[path]
        oid = object_id(path, data)
        if not is_large(path, len(data)):
            return Reply(data, headers=commit | {"ETag": f'"{oid}"'})
        linked = {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(data))}
        return Reply(status=302, headers=commit | linked | {"Location": f"{self.storage_url}/{oid}"})

    @endpoint("GET", "/storage/{oid}")
    def download(self, request, oid):
        if oid not in self.storage:
            raise Refusal(404, "No such object")
        return Reply(self.storage[oid], headers={"ETag": f'"{oid}"'})


def check_card(text: str) -> tuple[str | None, str | None]:
    """What is wrong and what is doubtful about a card's metadata, by the Hub's documentation (modelcard.md)."""
    match = re.match(r"---\r?\n(.*?)\r?\n?---\s*(\n|$)", text, flags=re.DOTALL)
    if match is None or not match[1].strip():
        return None, "empty or missing yaml metadata in repo card"
    try:
        metadata = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        return f"The metadata is not YAML: {error}", None
    if not isinstance(metadata, dict):
        return "The metadata must be a mapping", None
    return _find_error(metadata), _find_doubt(metadata)


def _find_error(metadata: dict) -> str | None:
    for name, pattern in FIELDS.items():
        for value in _listed(metadata.get(name, [])):
            if not isinstance(value, str) or not pattern.fullmatch(value):
                return f'"{name}" with value {value!r} is not valid'
    try:
        for model in metadata.get("model-index", []):
            names = [model["name"]]
            for result in model["results"]:
                names += [result["task"]["type"], result["dataset"]["type"], result["dataset"]["name"]]
                names += [metric["type"] for metric in result["metrics"] if metric["value"] is not None]
            if not all(isinstance(name, str) and name for name in names):
                return '"model-index" has a name or type that is no text'
    except (AttributeError, KeyError, TypeError) as error:
        return f'"model-index" is not as it must be: {error!r}'
    return None


def _find_doubt(metadata: dict) -> str | None:
    task = metadata.get("pipeline_tag", "image-classification")
    return None if task in TASKS else f"The pipeline tag {task!r} is not in the official list: {', '.join(TASKS)}"


def _listed(value) -> list:
    return value if isinstance(value, list) else [value]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def setup(self):
        super().setup()
        self.server.hub.connections.add(self.connection)

    def handle(self):
        with suppress(ConnectionError):  # clients may die
            super().handle()

    def finish(self):
        self.server.hub.connections.discard(self.connection)
        with suppress(OSError):
            super().finish()

    def handle_request(self):
        hub, path = self.server.hub, urlsplit(self.path).path
        with hub.lock:
            self.number = len(hub.log)
            hub.log.append((self.command, path))
            hub.sent.append(0)
        fault = hub.fault(self.command, path)
        if fault == "cut" and self.command in ("POST", "PUT"):
            self.rfile.read1()
            self.close_connection = True
            return
        body = self.read_body()
        if callable(fault):
            fault()
        try:
            if isinstance(fault, int):
                raise Refusal(fault, "Something is broken here")
            token = self.headers.get("Authorization", "").removeprefix("Bearer ")
            if token and token not in hub.tokens:
                raise Refusal(401, "Invalid credentials in Authorization header")
            reply = hub.answer(Request(self.command, path, body, hub.tokens.get(token)))
        except Refusal as refusal:
            reply = Reply(refusal.values, refusal.status, refusal.headers | {"Retry-After": "0"})
        self.send(reply, cut=fault == "cut")

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def send(self, reply: Reply, cut: bool):
        data = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
        status, headers = reply.status, reply.headers
        if status == 200 and (match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))):
            status, headers = 206, headers | {"Content-Range": f"bytes {match[1]}-{len(data) - 1}/{len(data)}"}
            data = data[int(match[1]) :]
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(data))}).items():
            self.send_header(name, value)
        head = len(b"".join(self._headers_buffer)) + len(b"\r\n")
        self.end_headers()
        self.server.hub.sent[self.number] += head
        if self.command != "HEAD":
            self.send_body(data[: len(data) // 2] if cut else data)
        self.close_connection |= cut

    def send_body(self, data: bytes):
        for start in range(0, len(data), CHUNK):
            chunk = data[start : start + CHUNK]
            self.server.hub.wait_for_link(len(chunk))
            self.wfile.write(chunk)
            self.server.hub.sent[self.number] += len(chunk)

    def log_message(self, *message):
        pass


if __name__ == "__main__":
    with HubServer(port=8080) as server:
        print(f"HF_ENDPOINT={server.url} HF_TOKEN={next(iter(server.tokens))} HF_HUB_DISABLE_XET=1", flush=True)
        with suppress(KeyboardInterrupt):
            threading.Event().wait()
