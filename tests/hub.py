"""A stand-in for the Hub: so much of its HTTP interface as uploading and downloading a model takes, in memory."""

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """What was uploaded: repository -> path -> content; and the cards that were held up for checking."""

    def __init__(self):
        self.files, self.objects, self.cards = {}, {}, []

    @contextmanager
    def serving(self):
        """Its address, while it answers."""
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
            server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def _say(self, content, status=200, **headers):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _body(self):
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _address(self):
        return f"http://{self.headers['Host']}"

    def do_POST(self):
        parts, body = urlsplit(self.path).path.strip("/").split("/"), self._body()
        if parts == ["api", "repos", "create"]:
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'somebody'}/{asked['name']}"
            self.hub.files.setdefault(name, {})
            self._say({"url": f"{self._address()}/{name}", "id": name, "name": name})
        elif parts == ["api", "validate-yaml"]:
            self.hub.cards.append(json.loads(body)["content"])
            self._say({"errors": [], "warnings": []})
        elif parts[4:5] == ["preupload"]:
            asked = json.loads(body)["files"]
            modes = ["lfs" if file["path"].endswith(".safetensors") else "regular" for file in asked]
            self._say(
                {
                    "files": [
                        {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}
                        for file, mode in zip(asked, modes, strict=True)
                    ]
                }
            )
        elif parts[-2:] == ["objects", "batch"]:
            objects = json.loads(body)["objects"]
            for item in objects:
                item["actions"] = {"upload": {"href": f"{self._address()}/lfs/{item['oid']}"}}
            self._say({"transfer": "basic", "objects": objects})
        elif parts[4:5] == ["commit"]:
            name = "/".join(parts[2:4])
            files = self.hub.files[name]
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = self.hub.objects[value["oid"]]
            self._say({"success": True, "commitOid": COMMIT, "commitUrl": f"{self._address()}/{name}/commit/{COMMIT}"})
        else:
            self._say({"error": self.path}, 404)

    def do_PUT(self):
        content = self._body()
        self.hub.objects[hashlib.sha256(content).hexdigest()] = content
        self._say(b"")

    def do_GET(self):
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        name, rest = ("/".join(parts[2:4]), parts[4:]) if parts[0] == "api" else ("/".join(parts[:2]), parts[2:])
        files = self.hub.files.get(name)
        if files is None:
            self._say({"error": "Repository not found"}, 404, **{"X-Error-Code": "RepoNotFound"})
        elif parts[0] == "api" and rest[:1] == ["tree"]:
            self._say([{"type": "file", "path": path, "size": len(data), "oid": _oid(data)} for path, data in files.items()])
        elif parts[0] == "api":
            self._say({"id": name, "sha": COMMIT, "siblings": [{"rfilename": path} for path in files]})
        elif (path := "/".join(rest[2:])) in files:
            headers = {"ETag": f'"{_oid(files[path])}"', "X-Repo-Commit": COMMIT}
            self._say(files[path], **headers)
        else:
            self._say(b"", 404, **{"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})

    do_HEAD = do_GET


def _oid(content):
    return hashlib.sha256(content).hexdigest()
