"""How the place of a shard folder is written. Pure syntax: no disk, no network.

    FOLDER or file:///FOLDER             on a disk of this machine
    http://HOST/FOLDER, https://...      a web server
    s3://BUCKET/FOLDER                   S3, or what speaks its protocol (AWS_ENDPOINT_URL)
    pipe:COMMAND with {file} in it       a shell command that prints one file of the folder

A file in a folder is written FOLDER/NAME, whatever the folder is.

A password or a query string (of a signed URL) would be kept in config.yaml and shown in messages. So it is written as
the name of an environment variable, which the ranks look up: https://$USER:$PASSWORD@HOST/FOLDER?$QUERY.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import SplitResult, unquote, urlsplit

from bigtrain.config.errors import UserError

PLACE = "{file}"
"""Where a command behind pipe: has the name of the file."""
_PIPE = "pipe:"
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_URL_IN_TEXT = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s\"`]+")
_VARIABLE = re.compile(r"\$(\w+)", re.ASCII)
_SECRET_NAME = re.compile(r"sig|token|key|secret|pass|cred|auth", re.IGNORECASE)
_LONGEST_PUBLIC_VALUE = 16
_PARTS_OF_ONE = 2
"""Of a path, in the short name of data where there are no others."""
_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*", re.ASCII)


@dataclass(frozen=True)
class Location:
    """Where a shard folder lies."""

    kind: str
    """folder, http, s3 or pipe."""
    text: str
    """As the user wrote it; of file:// the path alone."""

    @property
    def is_remote(self) -> bool:
        return self.kind != "folder"

    @property
    def name(self) -> str:
        """To show: without passwords, query strings and the arguments of a command."""
        return shown(self.text)


def parse(text: str) -> Location:
    """Raises ValueError, whose message shows no secret, where `text` is no such place."""
    if text.startswith(_PIPE):
        return _pipe(text)
    match = _SCHEME.match(text)
    if match is None:
        return Location("folder", text)
    scheme = match[1].lower()
    if scheme == "file":
        if not text[match.end() :].startswith("/"):
            raise ValueError("a file:// URL has the whole path behind it: file:///FOLDER")
        return Location("folder", unquote(text[match.end() :]))
    if scheme not in ("http", "https", "s3"):
        raise ValueError(f"{scheme}:// is not known: a folder, http(s)://, s3://, or pipe: and a command for all else")
    if re.search(r"\s|[\x00-\x1f\x7f]", text):
        raise ValueError("a URL has no spaces")
    try:
        parts = urlsplit(text)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise ValueError("it is no URL") from error
    if not host:
        raise ValueError(f"it names no {'bucket' if scheme == 's3' else 'host'}")
    if parts.fragment:
        raise ValueError("a URL of data has no #")
    if scheme == "s3" and (parts.query or "@" in parts.netloc):
        raise ValueError("an s3:// URL is bucket and path alone; the credentials come from the environment")
    return Location("s3" if scheme == "s3" else "http", text)


def _pipe(text: str) -> Location:
    command = text[len(_PIPE) :]
    if not command.strip():
        raise ValueError("there is no command behind pipe:")
    if PLACE not in command:
        raise ValueError(
            f"the command prints one file of the folder, so it has {PLACE} where the file's name goes: "
            f"pipe:curl -sf https://HOST/FOLDER/{PLACE}"
        )
    if "\x00" in command:
        raise ValueError("a command has no null characters")
    return Location("pipe", text)


def is_remote(text: str) -> bool:
    """Whether this names another place than a folder (or a file in one) on a disk, well written or not."""
    return text.startswith(_PIPE) or (bool(match := _SCHEME.match(text)) and match[1].lower() != "file")


def local(text: str) -> str:
    """The path on a disk that `text`, which names no other place, names: of file:// the path alone."""
    match = _SCHEME.match(text)
    return unquote(text[match.end() :]) if match else text


def literal_secret(text: str) -> str | None:
    """What in `text` looks like a secret and is written out, in words; None: nothing."""
    for url in _urls(text):
        user, has_password, password = url.netloc.rpartition("@")[0].partition(":")
        if any(part and not _VARIABLE.fullmatch(part) for part in (password if has_password else user,)):
            return "a password" if has_password else "a user's name or token"
        for part in url.query.split("&"):
            name, _, value = part.rpartition("=")
            is_public = len(value) <= _LONGEST_PUBLIC_VALUE and not _SECRET_NAME.search(name)
            if not (_VARIABLE.fullmatch(value) or is_public):
                return "a signature or a key in its query string"
    return None


def shown(text: str) -> str:
    """A place, or a file in one, without what may be secret."""
    if not text.startswith(_PIPE):
        return redacted(text)
    command = text[len(_PIPE) :]
    words = [word for word in command.split() if "=" not in word]
    kept = re.findall(rf"[^\s'\"`;|&<>()]*{re.escape(PLACE)}[^\s'\"`;|&<>()]*", command)
    return redacted(_PIPE + " ... ".join(dict.fromkeys([os.path.basename(words[0]) if words else "", *kept])))


def redacted(text: str) -> str:
    """`text` with the user, the password and the query string of every URL in it as ***."""

    def redact(match: re.Match[str]) -> str:
        scheme, _, rest = match[0].partition("://")
        host, slash, path = rest.partition("/")
        if "@" in path and re.search(r":\D", host):  # no port: a password with a / in it
            return f"{scheme}://***"
        path, question, _ = path.partition("?")
        host, question_at_once, _ = host.partition("?")
        host = f"***@{host.rpartition('@')[2]}" if "@" in host else host
        if question_at_once:
            return f"{scheme}://{host}?***"
        return f"{scheme}://{host}{slash}{path}" + ("?***" if question else "")

    return _URL_IN_TEXT.sub(redact, text)


def check_file(name: object) -> str:
    """`name`, where it may be a file of a shard folder: letters, digits and _ . - in one or more parts, none of which
    leaves the folder, means something to a shell or a URL, or is hidden. Raises ValueError otherwise."""
    if not isinstance(name, str) or len(name) > 255 or not _FILE.fullmatch(name):
        raise ValueError(
            f"it names the file {str(name)[:80]!r}: a file of a shard folder lies in the folder, and its name has "
            "letters, digits and _ . - only"
        )
    return name


def split_file(text: str) -> tuple[str, str]:
    """FOLDER/NAME -> (FOLDER, NAME)."""
    folder, _, name = text.rpartition("/")
    return folder, name


def join(location: Location, file: str) -> str:
    """Where a file of a folder is: a path, a URL (variables not looked up), or a command for a shell.

    `file` has passed `check_file`, so it needs no quoting in any of them, not even inside a user's own quotes."""
    check_file(file)
    if location.kind == "pipe":
        return location.text[len(_PIPE) :].replace(PLACE, file)
    if location.kind == "folder":
        return str(Path(location.text) / file)
    parts = urlsplit(location.text)
    return parts._replace(path=f"{parts.path.rstrip('/')}/{file}").geturl()


def look_up(text: str, environ: Mapping[str, str] = os.environ) -> str:
    """`text` with every $NAME replaced. Raises UserError where the environment has no such variable."""

    def value(match: re.Match[str]) -> str:
        if match[1] not in environ:
            raise UserError(f"the environment variable {match[1]} is not set, and data is to be fetched with it")
        return environ[match[1]]

    return _VARIABLE.sub(value, text)


def variables(command: str) -> list[str]:
    """Names of the environment variables that a shell command mentions."""
    return re.findall(r"\$\{?(\w+)", command, re.ASCII)


def short_names(folders: Iterable[str]) -> dict[str, str]:
    """Names of data for lines and plots, by folder: what is left of the folders without the parts at both ends that
    all have in common, such as web and code of /data/web/train and /data/code/train. Of a single folder its last two
    parts; whole folders where names would be the same."""
    whole = list(folders)
    parts = [folder.rstrip("/").split("/") for folder in whole]
    if len(whole) == 1:
        return {whole[0]: "/".join(parts[0][-_PARTS_OF_ONE:])}
    shortest = min(map(len, parts), default=0)
    before = _common([part[: shortest - 1] for part in parts])
    behind = _common([part[before:][::-1][: shortest - before - 1] for part in parts])
    names = ["/".join(part[before : len(part) - behind]) for part in parts]
    return dict(zip(whole, names if len(set(names)) == len(names) else whole, strict=True))


def _common(lists: list[list[str]]) -> int:
    """How many items all lists begin with alike."""
    count = 0
    for items in zip(*lists, strict=False):
        if len(set(items)) > 1:
            break
        count += 1
    return count


def _urls(text: str) -> Iterator[SplitResult]:
    for match in _URL_IN_TEXT.finditer(text):
        try:
            yield urlsplit(match[0].rstrip("');|&"))
        except ValueError:
            continue
