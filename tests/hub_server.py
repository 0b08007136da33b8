"""A loopback server that speaks as much of the Hugging Face hub's interface as loading rows and a model asks for."""

import hashlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OLDER = "89abcdef0123456789abcdef0123456789abcdef"


class Hub:
    """Serves folders as repositories; `repositories` maps (kind, name, commit) to a folder.

    Faults: `cut` drops the connection after so many bytes of a file, once for each number; `stall` answers the first so
    many requests whose path holds a word only after a client's time-out; `errors` answers them with a status.
    """

    def __init__(self, repositories: dict):
        self.repositories, self.asked = repositories, []
        self.cut, self.stall, self.errors = {}, {}, {}
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self):
        """Nobody answers from here on."""
        self.server.shutdown()
        self.server.server_close()

    def find(self, kind, name, revision):
        """The commit and the folder that a revision names; (None, None) for an unknown repository."""
        known = {commit: folder for (k, n, commit), folder in self.repositories.items() if (k, n) == (kind, name)}
        commit = {"main": COMMIT, "v1": OLDER}.get(revision, revision)
        return (commit, known.get(commit)) if known else (None, None)

    def _handler(hub):
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # or each answer waits 40 ms for the acknowledgement of its own headers

            def log_message(self, *_):
                pass

            def do_HEAD(self):
                self.answer(body=False)

            def do_GET(self):
                self.answer()

            def do_POST(self):
                self.form = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
                self.answer()

            def answer(self, body=True):
                path = unquote(urlsplit(self.path).path)
                hub.asked.append(f"{self.command} {path} {self.headers.get('Range', '')}".strip())
                for faults in (hub.stall, hub.errors):
                    for word, left in faults.items():
                        if word in path and left:
                            faults[word] = left[1:]
                            if faults is hub.errors:
                                return self.reply(left[0], b"{}")
                            time.sleep(left[0])
                parts = path.strip("/").split("/")
                if parts[0] == "api":
                    return self.api(parts[1].removesuffix("s"), "/".join(parts[2:4]), parts[4:])
                kind = "dataset" if parts[0] == "datasets" else "model"
                parts = parts[1:] if kind == "dataset" else parts
                if len(parts) > 4 and parts[2] == "resolve":
                    return self.file(kind, "/".join(parts[:2]), parts[3], "/".join(parts[4:]), body)
                self.missing("EntryNotFound")

            def api(self, kind, name, rest):
                commit, folder = hub.find(kind, name, rest[1] if len(rest) > 1 else "main")
                if commit is None or folder is None:
                    return self.missing("RepoNotFound" if commit is None else "RevisionNotFound")
                files = {str(f.relative_to(folder)): f for f in sorted(folder.rglob("*")) if f.is_file()}
                what = rest[0] if rest else "revision"
                if what == "revision":
                    siblings = [{"rfilename": name} for name in files]
                    found = {"id": name, "sha": commit, "siblings": siblings, "private": False, "tags": []}
                elif what == "tree":
                    under = "/".join(rest[2:])
                    found = [self.entry(n, f) for n, f in files.items() if n.startswith(under)]
                else:  # paths-info
                    found = [self.entry(n, files[n]) for n in self.form.get("paths", []) if n in files]
                self.reply(200, json.dumps(found).encode())

            def entry(self, name, file):
                return {"type": "file", "path": name, "size": file.stat().st_size, "oid": etag(file)}

            def file(self, kind, name, revision, path, body):
                commit, folder = hub.find(kind, name, revision)
                if folder is None or not (folder / path).is_file():
                    return self.missing("RepoNotFound" if commit is None else "EntryNotFound", commit)
                content = (folder / path).read_bytes()
                start = int((self.headers.get("Range") or "bytes=0-")[6:].split("-")[0])
                headers = {"ETag": f'"{etag(folder / path)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
                if start:
                    headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
                cut = hub.cut.get(path, []) if body else []
                self.reply(206 if start else 200, content[start:], headers, body, cut.pop(0) if cut else None)

            def missing(self, code, commit=None):
                self.reply(404, b"{}", {"X-Error-Code": code} | ({"X-Repo-Commit": commit} if commit else {}))

            def reply(self, status, content, headers=None, body=True, cut=None):
                self.send_response(status)
                for key, value in (headers or {}).items():
                    self.send_header(key, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if body and self.command != "HEAD":
                    self.wfile.write(content[:cut])
                if cut is not None:
                    self.close_connection = True

        return Handler


def etag(file: Path) -> str:
    """A name for a file's content, as git gives it."""
    return hashlib.sha1(file.read_bytes()).hexdigest()
