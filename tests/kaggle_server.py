"""A Kaggle on the loopback address, for the unmodified client: it keeps kernels, runs them by the clock of its polls, and fails on demand."""

import json
import re
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

DONE = dict.fromkeys(("01_baseline", "02_finetune", "03_compare"), "done")


class Kernel:
    """What the server knows of one kernel.

    `lasts`: how often a session is looked at before it has ended. `status_lag`, `source_lag`: for how many looks after
    a push the server goes on showing the session, or the version, before it. `next_*`: how the next session ends.
    """

    def __init__(self):
        self.version, self.request, self.polls, self.files, self.timeout = 0, {}, 0, {}, None
        self.outcome, self.next_outcome, self.next_notebooks, self.next_files = "COMPLETE", "COMPLETE", DONE, {}
        self.lasts, self.status_lag, self.source_lag = 2, 0, 0
        self.before, self.stale_status, self.stale_source = None, 0, 0
        self.ending = {}

    def push(self, body):
        self.before = (self.version, self.request, self.outcome if self.version else None)
        self.stale_status, self.stale_source = self.status_lag, self.source_lag
        self.version, self.request, self.polls = self.version + 1, body, 0
        self.outcome, self.next_outcome = self.next_outcome, "COMPLETE"
        stamp = re.search(r"medcot-staged [0-9a-f]{64} after-version-\d+", body["text"])
        record = {"stamp": stamp and stamp[0], "started": 1.0, "limit_hours": 5, "notebooks": self.next_notebooks}
        own = {"__output__.json": b"{}", "session.json": json.dumps(record).encode()}
        self.ending = own | self.next_files if self.next_notebooks is not None else {}
        self.next_notebooks = DONE

    def status(self):
        """Running until it was looked at `lasts` times, then ended; None for a kernel that the server denies."""
        if self.stale_status:
            self.stale_status -= 1
            return self.before[2]
        self.polls += 1
        if self.polls < self.lasts:
            return "RUNNING"
        self.files = self.ending or self.files
        return self.outcome

    def source(self):
        if self.stale_source:
            self.stale_source -= 1
            return self.before[:2]
        return self.version, self.request

    def active(self):
        return self.version > 0 and self.polls < self.lasts


class Server:
    """`address` answers as Kaggle's API and file store; `faults[verb]` lists what goes wrong with the next calls.

    A fault is a status code (alone, or with a Retry-After), "lost" (the call takes effect, the answer is cut off), "cut" (the connection breaks before
    it takes effect), a number of seconds as a float (slow) or a dict merged into the answer.
    """

    def __init__(self):
        self.kernels, self.calls, self.faults, self.downloads = {}, [], {}, []
        self.cut_files, self.log = {}, json.dumps([{"stream_name": "stdout", "time": 1.0, "data": "line of a log\n"}])
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # or each answer waits 40 ms for the acknowledgement of its own headers

            def log_message(self, *_):
                pass

            def do_POST(self):
                owner.post(self)

            def do_GET(self):
                owner.get(self)

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.address = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True).start()

    def close(self):
        self.http.shutdown()
        self.http.server_close()

    def pushes(self, slug=None):
        """Slugs of the pushes that took effect, in order; with `slug`, how many of that one."""
        made = [name for verb, name in self.calls if verb == "pushed"]
        return made if slug is None else made.count(slug)

    def kernel(self, ref):
        return self.kernels.setdefault(ref, Kernel())

    # --- requests

    def post(self, handler):
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])) or "{}")
        assert handler.headers["Authorization"].startswith("Basic "), "the client logs in with name and key"
        verb = handler.path.rsplit("/", 1)[-1]
        ref = body.get("slug") or f"{body.get('userName')}/{body.get('kernelSlug')}"
        self.calls.append((verb, ref))
        fault = self.faults.get(verb, []).pop(0) if self.faults.get(verb) else None
        if isinstance(fault, float):
            time.sleep(fault)
        if isinstance(fault, int) and not isinstance(fault, bool):
            return self.reply(handler, fault, {"code": fault, "message": f"made up {fault}"})
        if isinstance(fault, tuple):  # a status and the seconds of its Retry-After
            return self.reply(
                handler, fault[0], {"code": fault[0], "message": "slower"}, {"Retry-After": str(fault[1])}
            )
        if fault == "cut":
            return self.hang_up(handler)
        answer = getattr(self, verb)(ref, body, fault)
        if fault == "lost":
            return self.hang_up(handler)
        if answer is None:
            return self.reply(handler, 403, {"code": 403, "message": "Permission 'kernels.get' was denied"})
        return self.reply(handler, 200, answer | (fault if isinstance(fault, dict) else {}))

    def hang_up(self, handler):
        handler.close_connection = True
        handler.connection.shutdown(socket.SHUT_RDWR)

    def reply(self, handler, status, value, headers=()):
        data = json.dumps(value).encode()
        handler.send_response(status)
        for name, text in dict(headers).items():
            handler.send_header(name, text)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    def SaveKernel(self, ref, body, fault):
        kernel = self.kernel(ref)
        if isinstance(fault, dict) and fault.get("error"):
            return {"ref": "", "url": ""}
        active = [name for name, other in self.kernels.items() if other.active()]
        if len(active) >= 2:
            return {"ref": "", "url": "", "error": "Maximum batch GPU session count of 2 reached."}
        kernel.push(body)
        self.calls.append(("pushed", ref))
        return {"ref": f"/code/{ref}", "url": f"https://www.kaggle.com/code/{ref}", "versionNumber": kernel.version}

    def GetKernel(self, ref, body, fault):
        kernel = self.kernels.get(ref)
        version, request = kernel.source() if kernel else (0, {})
        if not version:
            return None
        blob = {"source": request["text"], "language": "python", "kernelType": "notebook", "slug": ref}
        return {"metadata": {"ref": ref, "currentVersionNumber": version}, "blob": blob}

    def GetKernelSessionStatus(self, ref, body, fault):
        kernel = self.kernels.get(ref)
        if kernel is None or not kernel.version:
            return None
        status = kernel.status()
        if status is None:
            return None
        return {"status": status} | ({"failureMessage": "the notebook raised"} if status == "ERROR" else {})

    def GetAcceleratorQuotaStatistics(self, ref, body, fault):
        return {"gpuQuota": {"timeUsed": "9000s", "totalTimeAllowed": "108000s"}}

    def ListKernelSessionOutput(self, ref, body, fault):
        """One file a page, so that every listing of more is paged."""
        names = sorted(self.kernels[ref].files)
        page = int(body.get("pageToken") or 0)
        answer = {"log": self.log, "files": []}
        if page < len(names):
            answer["files"] = [{"fileName": names[page], "url": f"http://localhost/files/{ref}/{page}"}]
        if page + 1 < len(names):
            answer["nextPageToken"] = str(page + 1)
        return answer

    def get(self, handler):
        """A file of a kernel's output; `cut_files[name]` breaks the next download after that many bytes."""
        _, _, rest = handler.path.partition("/files/")
        ref, _, page = rest.rpartition("/")
        name = sorted(self.kernels[ref].files)[int(page)]
        data = self.kernels[ref].files[name]
        self.downloads.append(name)
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        cut = self.cut_files.pop(name, None)
        handler.wfile.write(data[:cut])
        if cut is not None:
            self.hang_up(handler)
