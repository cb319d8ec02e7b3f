"""key=value on a command line, as bigtrain.generate and bigtrain.evaluate read it."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from bigtrain.config import arguments
from bigtrain.config.errors import UserError


@dataclass(frozen=True)
class Settings:
    where: str
    count: int = 3
    share: float = 0.5
    loud: bool = False


def parse(*argv: str) -> Settings:
    rules = {"rules": lambda given: [("count", given.count < 9, "less than 9")]}
    return arguments.parse(Settings, argv, command="a.command", aliases={"a.b": "count", "--loud": "loud"}, **rules)


def test_values_have_the_types_of_the_fields() -> None:
    assert parse("where=a=b c", "a.b=4", "share=1", "loud=True") == Settings("a=b c", 4, 1.0, True)
    assert parse("where=") == Settings("")
    assert isinstance(parse("where=x", "share=2").share, float)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["where"], "'where' has no value: write where=VALUE"),
        (["were=x"], "'were=x' is no setting of a.command; did you mean where?"),
        (["zzz=x"], "'zzz=x' is no setting of a.command; the keys are where, count, share, loud"),
        (["where=x", "count=1.5"], "count=1.5: it takes a whole number"),
        (["where=x", "a.b=one"], "count=one: it takes a whole number"),
        (["where=x", "share=half"], "share=half: it takes a number"),
        (["where=x", "loud=1"], "loud=1: it takes true or false"),
        (["where=x", "count=9"], "count=9: it takes less than 9"),
        (["where=\udce9"], "where='\\udce9': it is no UTF-8"),
        ([], "where=... is missing. --help tells more."),
    ],
)
def test_mistakes(argv: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(*argv)
    assert str(caught.value) == message


def test_a_flag_and_its_value_become_one_argument() -> None:
    assert arguments.joined(["a=b", "--tasks", "x,y", "c=d", "--tasks=z"], "--tasks") == [
        "a=b",
        "--tasks=x,y",
        "c=d",
        "--tasks=z",
    ]
    with pytest.raises(UserError, match="--tasks is the last argument"):
        arguments.joined(["--tasks"], "--tasks")


def test_exit_statuses(capsys: pytest.CaptureFixture[str]) -> None:
    def ends(error: BaseException) -> int:
        def command(argv: list[str]) -> int:
            raise error

        return arguments.run(["a=b"], "help", command)

    assert (ends(UserError("no such key")), ends(KeyboardInterrupt())) == (2, 130)
    said = capsys.readouterr()
    assert said.out == "" and said.err == "error: no such key\n"
    assert arguments.run(["a=b", "-h"], "\nhelp\n", lambda _: 7) == 0
    assert capsys.readouterr().out == "help\n"
    assert arguments.run([], "help", lambda _: 7) == 7
