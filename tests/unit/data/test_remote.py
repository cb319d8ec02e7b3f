"""A file comes whole or not at all, over a server that does everything wrong."""

from __future__ import annotations

import hashlib
import io
import logging
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bigtrain.config import locations
from bigtrain.config.errors import UserError
from bigtrain.data import remote
from bigtrain.data.remote import Cancelled, Expected, MissingError, Policy
from tests.faulty_server import Fault, FaultyServer, etag

FILE = "shard-000000.tar"
CONTENT = random.Random(1).randbytes(700_000)
OTHER = random.Random(2).randbytes(700_000)
QUICK = Policy(timeout_s=0.3, retries=3, backoff_s=0.01)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FaultyServer]:
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / FILE).write_bytes(CONTENT)
    with FaultyServer(tmp_path / "served") as server:
        yield server


def expected(content: bytes = CONTENT) -> Expected:
    return Expected(len(content), len(content), hashlib.sha256(content).hexdigest())


def fetch(server: FaultyServer, about: Expected | None = None, *, begun: bytes = b"", policy: Policy = QUICK) -> bytes:
    out = io.BytesIO(begun)
    remote.fetch(locations.parse(server.url), FILE, out, about or expected(), policy=policy)
    return out.getvalue()


def test_a_good_day(server: FaultyServer) -> None:
    assert fetch(server) == CONTENT
    assert [(request.range, request.status) for request in server.log] == [(None, 200)]


@pytest.mark.parametrize(
    "faults",
    [(Fault(cut_after=300_000), Fault(cut_after=100_000)), (Fault(stall_after=300_000), Fault(stall_after=100_000))],
    ids=["cut", "stall"],
)
def test_a_broken_transfer_goes_on_where_it_was(server: FaultyServer, faults: tuple[Fault, Fault]) -> None:
    server.fail(FILE, *faults)
    assert fetch(server) == CONTENT
    assert [(request.range, request.if_range, request.status) for request in server.log] == [
        (None, None, 200),
        ("bytes=300000-", etag(CONTENT), 206),
        ("bytes=400000-", etag(CONTENT), 206),
    ]


def test_progress_is_forgiven_more_failures(server: FaultyServer) -> None:
    server.fail(FILE, *[Fault(cut_after=70_000)] * 9)
    assert fetch(server) == CONTENT
    assert len(server.log) == 10


def test_a_server_that_is_busy(server: FaultyServer, caplog: pytest.LogCaptureFixture) -> None:
    server.fail(FILE, Fault(status=500), Fault(status=503), Fault(status=429))
    with caplog.at_level(logging.WARNING):
        assert fetch(server) == CONTENT
    assert [request.status for request in server.log] == [500, 503, 429, 200]
    assert f"data {server.url}: {FILE}: HTTP 503; trying again in" in caplog.text and "(2 of 3)" in caplog.text


def test_a_server_that_stays_busy(server: FaultyServer) -> None:
    server.fail(FILE, *[Fault(status=500)] * 99)
    with pytest.raises(UserError) as caught:
        fetch(server)
    assert str(caught.value) == (f"data {server.url}: {FILE}: HTTP 500, 4 times in a row (data.remote.retries=3).")
    assert len(server.log) == 4


def test_the_pauses_grow_and_heed_the_server(server: FaultyServer) -> None:
    pauses: list[float] = []

    class NoTime(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            pauses.append(timeout or 0)
            return False

    server.fail(FILE, *[Fault(status=503)] * 6, Fault(status=429, headers=(("Retry-After", "17"),)))
    patient, place = Policy(timeout_s=5, retries=8, backoff_s=1), locations.parse(server.url)
    remote.fetch(place, FILE, io.BytesIO(), expected(), policy=patient, cancelled=NoTime())
    for pause, most in zip(pauses, (1, 2, 4, 8, 16, 30), strict=False):
        assert most / 2 <= pause <= most
    assert 17 <= pauses[6] <= 30


@pytest.mark.parametrize(
    ("status", "words"), [(404, "no such file"), (403, "not allowed"), (401, "not allowed"), (400, "")]
)
def test_what_will_not_change_is_not_tried_again(server: FaultyServer, status: int, words: str) -> None:
    server.fail(FILE, *[Fault(status=status)] * 9)
    with pytest.raises(UserError, match=rf"{FILE}: HTTP {status}.*{words}") as caught:
        fetch(server)
    assert len(server.log) == 1
    assert isinstance(caught.value, MissingError) == (status == 404)


def test_a_file_that_changes_in_between_is_not_spliced(server: FaultyServer) -> None:
    server.fail(FILE, Fault(cut_after=300_000), Fault(replace=OTHER))
    assert fetch(server, expected(OTHER)) == OTHER
    assert [(request.range, request.status) for request in server.log] == [(None, 200), ("bytes=300000-", 200)]


def test_a_change_that_the_server_hides(server: FaultyServer) -> None:
    server.fail(FILE, Fault(cut_after=300_000), Fault(replace=OTHER, ignore_if_range=True))
    assert fetch(server, expected(OTHER)) == OTHER
    server.fail(FILE, Fault(cut_after=300_000), Fault(replace=CONTENT, ignore_if_range=True))
    assert fetch(server, Expected(1 << 20)) == CONTENT  # with no hash to tell


@pytest.mark.parametrize("fault", [Fault(ignore_range=True), Fault(wrong_range=True), Fault(status=416)])
def test_a_server_that_knows_no_ranges(server: FaultyServer, fault: Fault) -> None:
    for about in (expected(), Expected(1 << 20)):
        server.fail(FILE, Fault(cut_after=300_000), fault)
        assert fetch(server, about) == CONTENT


def test_without_etags_only_what_the_hash_proves_goes_on(server: FaultyServer) -> None:
    server.etags = False
    server.fail(FILE, Fault(cut_after=300_000))
    assert fetch(server) == CONTENT
    assert server.log[-1].range == "bytes=300000-"
    server.fail(FILE, Fault(cut_after=300_000))
    assert fetch(server, Expected(1 << 20)) == CONTENT
    assert server.log[-1].range is None


def test_what_an_earlier_process_left_is_gone_on_with(server: FaultyServer) -> None:
    assert fetch(server, begun=CONTENT[:500_000]) == CONTENT
    assert [request.range for request in server.log] == ["bytes=500000-"]
    assert fetch(server, begun=CONTENT) == CONTENT and len(server.log) == 1
    assert fetch(server, begun=bytes(500_000)) == CONTENT
    assert [request.range for request in server.log[1:]] == ["bytes=500000-", None]
    assert fetch(server, begun=CONTENT + b"x") == CONTENT
    assert fetch(server, Expected(1 << 20), begun=b"no hash") == CONTENT


def test_damage_is_not_taken(server: FaultyServer) -> None:
    damaged = bytearray(CONTENT)
    damaged[350_000] ^= 1
    (server.folder / FILE).write_bytes(damaged)
    with pytest.raises(UserError, match=r"its sha256 is not that of the index.*4 times in a row"):
        fetch(server)
    (server.folder / FILE).write_bytes(CONTENT + b"x")
    with pytest.raises(UserError, match="it has 700001 bytes, and the index says 700000"):
        fetch(server)


def test_no_server_fills_the_disk(server: FaultyServer) -> None:
    with pytest.raises(UserError, match="has 700,000 bytes, more than 1,000: split it"):
        fetch(server, Expected(1000))


def test_a_trickle_is_a_stall(server: FaultyServer) -> None:
    server.fail(FILE, *[Fault(trickle=True)] * 9)
    began = time.monotonic()
    with pytest.raises(UserError, match=r"only \d+ bytes came in \d+ s"):
        fetch(server)
    assert time.monotonic() - began < 5


def test_a_compressed_answer(server: FaultyServer) -> None:
    server.fail(FILE, Fault(headers=(("Content-Encoding", "gzip"),)))
    with pytest.raises(UserError, match="Content-Encoding 'gzip'"):
        fetch(server)


def test_no_server(server: FaultyServer) -> None:
    dead = locations.parse("http://127.0.0.1:1")
    with pytest.raises(UserError, match=r"Connection refused, 4 times in a row"):
        remote.fetch(dead, FILE, io.BytesIO(), expected(), policy=QUICK)


def test_a_fetch_can_be_called_off(server: FaultyServer) -> None:
    server.fail(FILE, *[Fault(status=500)] * 99)
    enough = threading.Event()
    threading.Timer(0.2, enough.set).start()
    patient = Policy(timeout_s=5, retries=99, backoff_s=60)
    with pytest.raises(Cancelled):
        remote.fetch(locations.parse(server.url), FILE, io.BytesIO(), expected(), policy=patient, cancelled=enough)


def test_credentials_and_queries_reach_the_server_and_no_message(
    server: FaultyServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("DATA_USER", "ann")
    monkeypatch.setenv("DATA_PASSWORD", "p@ss/word")
    monkeypatch.setenv("DATA_QUERY", "sig=AbC%2Fd&x=1")
    place = locations.parse(server.url.replace("//", "//$DATA_USER:$DATA_PASSWORD@") + "?$DATA_QUERY")
    server.fail(FILE, Fault(status=500), Fault(cut_after=10), Fault(status=403))
    with caplog.at_level(logging.DEBUG), pytest.raises(UserError) as caught:
        remote.fetch(place, FILE, io.BytesIO(), expected(), policy=QUICK)
    for request in server.log:
        assert request.authorization == "Basic YW5uOnBAc3Mvd29yZA=="
        assert request.query == "sig=AbC%2Fd&x=1"
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("bigtrain")]
    for text in (str(caught.value), *ours):
        assert "word" not in text.lower() and "AbC" not in text and "ann" not in text
    monkeypatch.delenv("DATA_QUERY")
    with pytest.raises(UserError, match="environment variable DATA_QUERY is not set"):
        remote.fetch(place, FILE, io.BytesIO(), expected(), policy=QUICK)


# Commands -----------------------------------------------------------------------------------------------------------


def by_command(command: str, about: Expected | None = None) -> bytes:
    out = io.BytesIO()
    remote.fetch(locations.parse(f"pipe:{command}"), FILE, out, about or expected(), policy=QUICK)
    return out.getvalue()


def test_a_command(server: FaultyServer) -> None:
    assert by_command(f"cat {server.folder}/{{file}}") == CONTENT
    assert by_command(f"gzip -c '{server.folder}/{{file}}' | gunzip | cat") == CONTENT
    assert by_command(f"echo noise >&2; cat {server.folder}/{{file}}", Expected(1 << 20)) == CONTENT


def test_a_command_that_works_the_second_time(server: FaultyServer, tmp_path: Path) -> None:
    mark, file = tmp_path / "mark", server.folder / "{file}"
    assert (
        by_command(f"if [ -e {mark} ]; then cat {file}; else touch {mark}; head -c 9999 {file}; false; fi") == CONTENT
    )
    assert by_command(f"if [ -e {mark} ]; then rm {mark}; head -c 9999 {file}; else cat {file}; fi") == CONTENT


def test_a_command_that_fails(server: FaultyServer, tmp_path: Path) -> None:
    script = tmp_path / "fetch.sh"
    script.write_text("echo it is hopeless >&2; exit 3")
    with pytest.raises(UserError, match=r"exit status 3: it is hopeless, 4 times in a row") as caught:
        by_command(f"sh {script} {{file}}")
    assert str(caught.value).startswith(f"data pipe:sh ... {{file}}: {FILE}: ")
    with pytest.raises(UserError, match=r"exit status 127"):
        by_command("no-such-command {file}")


def test_a_command_that_stalls_is_ended_with_all_it_started(server: FaultyServer, tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    with pytest.raises(UserError, match=r"the command printed nothing for 0.3 s"):
        by_command(f"(sleep 60 & echo $! > {pid}; wait) | cat # {{file}}")
    process = Path("/proc") / pid.read_text().strip()
    deadline = time.monotonic() + 5
    while process.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not process.exists() or "Z" in (process / "stat").read_text().split()[2]


def test_the_secrets_of_a_command_stay_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    script = tmp_path / "fetch.sh"
    script.write_text('echo "no luck with $2 and $DATA_TOKEN at https://a:pw@h/x?sig=99" >&2; exit 1')
    monkeypatch.setenv("DATA_TOKEN", "t0ps3cret")
    command = f'sh {script} -H "Bearer hunter22" {{file}} $DATA_TOKEN'
    with caplog.at_level(logging.DEBUG), pytest.raises(UserError) as caught:
        by_command(command)
    for text in (str(caught.value), caplog.text):
        assert "no luck with *** *** and *** at https://***@h/x?***" in text
        assert "t0ps3cret" not in text and "hunter22" not in text and "pw@" not in text and "99" not in text
