"""How places are written, refused and shown."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigtrain.config import locations
from bigtrain.config.check import check
from bigtrain.config.errors import UserError
from bigtrain.config.schema import Config, DataConfig, SourceConfig, TokenizerConfig

NEVER_SHOWN = "hunter22"


@pytest.mark.parametrize(
    ("text", "kind", "file"),
    [
        ("/data/corpus/train", "folder", "/data/corpus/train/a.tar"),
        ("data:v2/train", "folder", "data:v2/train/a.tar"),
        ("file:///data/my%20corpus", "folder", "/data/my corpus/a.tar"),
        ("https://host/corpus/train", "http", "https://host/corpus/train/a.tar"),
        ("http://host:8080/", "http", "http://host:8080/a.tar"),
        ("HTTPS://host", "http", "https://host/a.tar"),
        ("https://host/corpus?$QUERY", "http", "https://host/corpus/a.tar?$QUERY"),
        ("s3://bucket/corpus/", "s3", "s3://bucket/corpus/a.tar"),
        ("s3://bucket", "s3", "s3://bucket/a.tar"),
        ("pipe:curl -s https://host/{file} | cat", "pipe", "curl -s https://host/a.tar | cat"),
    ],
)
def test_places(text: str, kind: str, file: str) -> None:
    location = locations.parse(text)
    assert (location.kind, locations.join(location, "a.tar")) == (kind, file)
    assert location.is_remote == locations.is_remote(text) == (kind != "folder")
    assert locations.split_file(f"{text.rstrip('/')}/tokenizer.model") == (text.rstrip("/"), "tokenizer.model")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("gs://bucket/x", "gs:// is not known.*pipe:"),
        ("https:///x", "names no host"),
        ("s3:///x", "names no bucket"),
        ("https://host:port/x", "no URL"),
        ("https://[host/x", "no URL"),
        ("https://host/a b", "no spaces"),
        ("https://host/x\n", "no spaces"),
        ("https://host/x#y", "no #"),
        ("s3://key:secret@bucket/x", "credentials come from the environment"),
        ("s3://bucket/x?versionId=1", "credentials come from the environment"),
        ("file://host/x", "file:///FOLDER"),
        ("pipe:", "no command"),
        ("pipe:cat shard-{000000..000099}.tar", "{file}"),
    ],
)
def test_what_is_no_place(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        locations.parse(text)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/data/corpus", "/data/corpus"),
        ("s3://bucket/corpus", "s3://bucket/corpus"),
        ("https://host:1/a/b?download=true", "https://host:1/a/b?***"),
        ("https://ann:hunter22@host:1/a/b", "https://***@host:1/a/b"),
        ("https://hunter22@host", "https://***@host"),
        ("https://host?sig=hunter22/x", "https://host?***"),
        ("https://ann:hunter22/x@host/a", "https://***"),
        ("pipe:TOKEN=hunter22 /bin/curl -u ann:hunter22 https://host/{file}", "pipe:curl ... https://host/{file}"),
        ("pipe:curl 'https://host/{file}?sig=hunter22'", "pipe:curl ... https://host/{file}?***"),
        ("pipe:sh -c 'H=hunter22 curl s3://b/{file} -'", "pipe:sh ... s3://b/{file}"),
        ("pipe:cat {file}|cat", "pipe:cat ... {file}"),
    ],
)
def test_what_is_shown(text: str, shown: str) -> None:
    assert locations.shown(text) == shown
    assert NEVER_SHOWN not in locations.redacted(f"before {text} after") or text.startswith("pipe:")


@settings(max_examples=50, deadline=None)
@given(
    user=st.text("abc%:", max_size=5),
    password=st.text("abc0123-._~!$&'()*+,;=%", min_size=8, max_size=20),
    query=st.text("abc0123=&%", max_size=9),
)
def test_no_password_is_ever_shown(user: str, password: str, query: str) -> None:
    for url in (f"https://{user}:{password}@host/a", f"https://host/a?{query}{password}"):
        assert urlsplit(url).hostname == "host"
        assert password not in locations.shown(url).replace("https://", "").replace("host/a", "")


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        ("https://$USER:$PASSWORD@host/x", None),
        ("https://ann:$PASSWORD@host/x?$QUERY", None),
        ("https://host/x?token=$TOKEN&download=true", None),
        ("pipe:curl 'https://host/{file}?$QUERY' | gunzip", None),
        ("pipe:curl -u ann:hunter22 https://host/{file}", None),
        ("https://ann:hunter22@host/x", "a password"),
        ("https://hunter22@host/x", "a user's name or token"),
        ("https://host/x?X-Amz-Signature=1", "a signature or a key"),
        ("https://host/x?v=0123456789abcdefg", "a signature or a key"),
        ("pipe:curl 'https://ann:hunter22@host/{file}'", "a password"),
    ],
)
def test_secrets_that_are_written_out(text: str, secret: str | None) -> None:
    found = locations.literal_secret(text)
    assert found is None if secret is None else found and found.startswith(secret)


@pytest.mark.parametrize("name", ["shard-000000.tar", "index.json", "a/b/c.idx.npy", "_x"])
def test_names_of_files(name: str) -> None:
    assert locations.check_file(name) == name


BAD_NAMES = [
    "",
    ".",
    "..",
    "../x",
    "a/../x",
    "/etc/passwd",
    "a//b",
    "a/",
    "http://x/y",
    "s3:x",
    "a b",
    "$(id)",
    "`id`",
    "a;b",
]
BAD_NAMES += [
    "'",
    "-rf",
    "a/-x",
    ".hidden",
    "a/.x",
    "a?b",
    "a#b",
    "a%2e",
    "a\\b",
    "a\nb",
    "a\x00b",
    "\xe9",
    "a" * 256,
    None,
    7,
]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_that_are_refused(name: object) -> None:
    with pytest.raises(ValueError, match="it names the file"):
        locations.check_file(name)


@settings(max_examples=50, deadline=None)
@given(st.text("aZ0_.-/ $'`;|&\n~?#%*\\\xe9", max_size=8))
def test_a_name_that_passes_means_itself_to_a_shell(name: str) -> None:
    try:
        locations.check_file(name)
    except ValueError:
        return
    assert shlex.quote(name) == name
    assert urlsplit(f"http://host/{name}").path == f"/{name}"
    assert Path("/root", name).resolve().is_relative_to("/root")


def test_a_name_in_any_quotes() -> None:
    for command in ("echo {file}", "echo '{file}'", 'echo "{file}"', "sh -c \"echo '{file}'\""):
        filled = locations.join(locations.parse(f"pipe:{command}"), "a/b-c_d.tar")
        assert subprocess.run(filled, shell=True, capture_output=True, text=True, check=True).stdout == "a/b-c_d.tar\n"


def test_variables_are_looked_up() -> None:
    assert locations.look_up("a=$A&b=$B_2.x", {"A": "1", "B_2": "2"}) == "a=1&b=2.x"
    with pytest.raises(UserError, match="environment variable A is not set"):
        locations.look_up("$A", {})


def problems(path: str, tokenizer: str = "x.model") -> str:
    config = Config(data=DataConfig(train=[SourceConfig(path)]), tokenizer=TokenizerConfig(tokenizer))
    return "\n".join(
        str(problem) for problem in check(config, 4) if problem.key.startswith(("data.train", "tokenizer"))
    )


def test_a_config_names_places() -> None:
    for place in ("s3://bucket/x", "https://$USER:$PW@host/x?$Q", "pipe:cat /x/{file}", "/x"):
        assert problems(place, f"{place}/tokenizer.model") == ""
    assert problems("gs://bucket/x").startswith("data.train.0.path=gs://bucket/x: gs:// is not known")
    found = problems(f"https://ann:{NEVER_SHOWN}@host/x", f"https://host/x?sig={NEVER_SHOWN}/tokenizer.model")
    assert "data.train.0.path=https://***@host/x: a password is written out" in found
    assert "tokenizer.path=https://host/x?***: a signature or a key in its query string is written out" in found
    assert NEVER_SHOWN not in found


@pytest.mark.parametrize(("text", "path"), [("a/b", "a/b"), ("file:///a/b%20c", "/a/b c"), ("file://a", "a"), ("", "")])
def test_the_path_of_a_place_on_a_disk(text: str, path: str) -> None:
    """Also of one that is badly written, which `parse` refuses."""
    assert locations.local(text) == path
