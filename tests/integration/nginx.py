"""A real nginx, run as this user on a free port, with a configuration of its own in a folder of its own."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import requests

from bigtrain.launching.environment import free_port

BINARY = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
WHY_SKIPPED = "nginx is not installed, and tests/install_system_packages.sh could not install it"
USER, PASSWORD = "ann", "p@ss/word"
_CONFIG = """
{user}daemon off;
worker_processes 1;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
events {{}}
http {{
  log_format ranges '$request_uri $status "$http_range" $body_bytes_sent $remote_user';
  access_log {folder}/access.log ranges;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
  server {{
    listen 127.0.0.1:{port};
    root {root};
    location /slow/ {{ alias {root}/; limit_rate 1m; }}
    location /private/ {{ alias {root}/; auth_basic shards; auth_basic_user_file {folder}/htpasswd; }}
    location /moved/ {{ rewrite ^/moved/(.*)$ /$1 redirect; }}
  }}
}}
"""


@dataclass
class Nginx:
    """Serves `root` at /, /slow/ (1 MB/s), /private/ (with USER and PASSWORD) and /moved/ (a redirect)."""

    root: Path
    folder: Path

    def __enter__(self) -> Nginx:
        self.folder.mkdir()
        self.port = free_port()
        user = "user root; " if os.geteuid() == 0 else ""  # else its workers are nobody, and read nothing of ours
        config = _CONFIG.format(folder=self.folder, root=self.root, port=self.port, user=user)
        (self.folder / "nginx.conf").write_text(config)
        (self.folder / "htpasswd").write_text(f"{USER}:{{PLAIN}}{PASSWORD}\n")
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        assert BINARY
        self._process = subprocess.Popen(
            [BINARY, "-p", str(self.folder), "-e", f"{self.folder}/error.log", "-c", str(self.folder / "nginx.conf")]
        )
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                requests.get(self.url, timeout=1)
                return
            except requests.ConnectionError:
                time.sleep(0.05)
        raise RuntimeError(f"nginx does not start: {(self.folder / 'error.log').read_text()}")

    def stop(self) -> None:
        """At once; transfers are cut off."""
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(10)

    def log(self) -> list[str]:
        """`URI STATUS "RANGE" BYTES USER` of each request."""
        return (self.folder / "access.log").read_text().splitlines()
