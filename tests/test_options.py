"""The command line: getopt's rules, key=value text, character devices, and the words in which mistakes are told."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpd import __version__
from qmpd.control.qapi import KEYVAL, WIRE
from qmpd.errors import QmpdError
from qmpd.options import (
    Arguments,
    FdAddress,
    InetAddress,
    Monitor,
    MonitorMode,
    NullChardev,
    Option,
    Show,
    SocketChardev,
    StdioChardev,
    Trace,
    UnixAddress,
    complaint,
    interpret,
    parse_keyval,
    scan,
)

LONG_PART = "k" * 127


def run(*words: str) -> tuple[list[Any], str]:
    """What the options mean, and all that standard error is told until the first mistake."""
    told: list[str] = []
    meanings: list[Any] = []
    option = None

    def warn(text: str) -> None:
        told.append(complaint("qmpd", f"warning: {text}", option))

    try:
        for option in scan(words).options:
            meanings.append(interpret(option, warn))
    except QmpdError as error:
        told.append(complaint("qmpd", error.desc, option))
    return meanings, "".join(told)


def meaning(name: str, value: str) -> Any:
    (result,), told = run(f"--{name}", value)
    assert not told
    return result


def mistake(name: str, value: str) -> str:
    """The text behind program and option."""
    meanings, told = run(f"--{name}", value)
    assert not meanings
    return told.removeprefix(f"qmpd: --{name} {value}: ").removesuffix("\n")


class TestWords:
    """Splitting the command line."""

    def test_options_keep_their_order_and_spelling(self) -> None:
        """Prefixes, both ways to give an argument, clusters; nothing behind -- counts."""
        line = scan(["--o=a,b=c", "-Tx", "word", "--mon", "-V", "-T", "y", "-", "--", "--nope"])

        assert line.options == (
            Option("object", "a,b=c", "--o=a,b=c"),
            Option("trace", "x", "-Tx"),
            Option("", "word", "word"),
            Option("monitor", "-V", "--mon -V"),
            Option("trace", "y", "-T y"),
            Option("", "-", "-"),
        )
        assert (line.daemonize, line.pidfile, line.show) == (False, None, None)

    def test_the_process_options_count_wherever_they_stand(self) -> None:
        """The last pid file wins."""
        line = scan(["--pid=/a", "--blockdev", "x", "--daemon", "--pidfile", "/b"])

        assert (line.daemonize, line.pidfile, len(line.options)) == (True, "/b", 1)

    @pytest.mark.parametrize("words", [["--help"], ["-hx"], ["-Th", "--hel", "--nope"], ["word", "-h"]])
    def test_help_comes_before_the_mistakes_behind_it(self, words: list[str]) -> None:
        """It names every option."""
        text = scan(words, "prog").show

        assert text is not None
        assert text.startswith("Usage: prog [options]\n")
        for name in ("--blockdev", "--chardev", "--export", "--monitor", "--nbd-server", "--object", "--pidfile"):
            assert f"\n  {name} " in text

    def test_version(self) -> None:
        """One line with our version and the protocol's."""
        assert scan(["-V", "--nope"]).show == f"qmpd version {__version__} (QMP 10.0.2)\n"

    @pytest.mark.parametrize(
        ("words", "text"),
        [
            (["--foo"], "unrecognized option '--foo'"),
            (["--foo=bar", "-V"], "unrecognized option '--foo=bar'"),
            (["--=x"], "option '--=x' is ambiguous; possibilities: '--blockdev' '--chardev'"),
            (["-b"], "invalid option -- 'b'"),
            (["-xV"], "invalid option -- 'x'"),
            (["--blockdev"], "option '--blockdev' requires an argument"),
            (["--dae", "--block"], "option '--blockdev' requires an argument"),
            (["--daemon="], "option '--daemonize' doesn't allow an argument"),
            (["--version=x"], "option '--version' doesn't allow an argument"),
            (["-T"], "option requires an argument -- 'T'"),
        ],
    )
    def test_mistakes(self, words: list[str], text: str) -> None:
        """They are told without naming an option as typed."""
        with pytest.raises(QmpdError) as caught:
            scan(words)

        assert caught.value.desc.startswith(text)

    def test_operands_are_mistakes_in_their_place(self) -> None:
        """Options before one are carried out."""
        meanings, told = run("--chardev", "null,id=c", "word", "--chardev", "nonsense")

        assert meanings == [NullChardev("c")]
        assert told == "qmpd: word: Unexpected argument\n"


class TestKeyval:
    """k=v,k=v."""

    @pytest.mark.parametrize(
        ("text", "tree"),
        [
            ("", {}),
            ("raw", {"d": "raw"}),
            ("raw,", {"d": "raw"}),
            ("a.0x", {"d": "a.0x"}),
            ("a=b=c,", {"a": "b=c"}),
            ("a=x,,y,,,b=", {"a": "x,y,", "b": ""}),
            ("a=1,a=2", {"a": "2"}),
            ("f.driver=file,f.filename=/x,n=a", {"f": {"driver": "file", "filename": "/x"}, "n": "a"}),
            ("a.1=y,a.0=x", {"a": ["x", "y"]}),
            ("a.0=x,a.00=y", {"a": ["y"]}),
            ("a.0.b=1,a.1.0=2", {"a": [{"b": "1"}, ["2"]]}),
            ("__com.example_x.y=1", {"__com.example_x": {"y": "1"}}),
            ("help=1", {"help": "1"}),
            (f"{LONG_PART}.{LONG_PART}=1", {LONG_PART: {LONG_PART: "1"}}),
            ("a=é\n=", {"a": "é\n="}),
        ],
    )
    def test_trees(self, text: str, tree: dict[str, Any]) -> None:
        """Dots nest, numbers make lists, two commas are one, the last one wins."""
        assert parse_keyval(text, "d") == (tree, False)

    @pytest.mark.parametrize(
        ("text", "desc"),
        [
            ("a,b", "Expected '=' after parameter 'b'"),
            ("a,b.c", "Expected '=' after parameter 'b.c'"),
            ("a=1,d", "Expected '=' after parameter 'd'"),
            ("=x", "Invalid parameter ''"),
            (",d=raw", "Invalid parameter ''"),
            ("a,,b", "Invalid parameter ''"),
            ("1x=1", "Invalid parameter '1x'"),
            ("0=x", "Invalid parameter '0'"),
            ("a..b=1", "Invalid parameter 'a..b'"),
            ("a.=1", "Invalid parameter 'a.'"),
            ("a.0x=1", "Invalid parameter 'a.0x'"),
            ("_a=1", "Invalid parameter '_a'"),
            ("__a=1", "Invalid parameter '__a'"),
            ("é=1", "Invalid parameter 'é'"),
            ("a=1, b=1", "Invalid parameter ' b'"),
            (f"{LONG_PART}k=1", f"Parameter '{LONG_PART}k' is too long"),
            (f"a.{LONG_PART}k=1", f"Parameter fragment '{LONG_PART}k' is too long"),
            ("a=1,a.b=2", "Parameters 'a.*' used inconsistently"),
            ("a.b=2,a=1", "Parameters 'a.*' used inconsistently"),
            ("a.b.c=1,a.b=2", "Parameters 'a.b.*' used inconsistently"),
            ("a.0=x,a.b=y", "Parameters 'a.*' used inconsistently"),
            ("a.1=x", "Parameter 'a.0' missing"),
            ("a.0=x,a.2=y", "Parameter 'a.1' missing"),
            ("a.0.1=x", "Parameter 'a.0.0' missing"),
            ("a.99999999999999999999=1", "Parameter 'a.0' missing"),
        ],
    )
    def test_mistakes(self, text: str, desc: str) -> None:
        """Each names the parameter."""
        with pytest.raises(QmpdError) as caught:
            parse_keyval(text, "d")

        assert caught.value.desc == desc

    @pytest.mark.parametrize("text", ["help", "?", "help,x=y", "x=y,help", "raw,?"])
    def test_help_is_an_item_of_its_own(self, text: str) -> None:
        """It sets nothing."""
        tree, wants_help = parse_keyval(text, "d")

        assert wants_help
        assert "help" not in {*tree, *tree.values()}

    @given(st.dictionaries(st.from_regex(r"[a-z][a-z0-9_-]{0,5}", fullmatch=True), st.text(max_size=6), min_size=1))
    def test_any_value_can_be_said(self, tree: dict[str, str]) -> None:
        """With commas doubled."""
        text = ",".join(f"{key}={value.replace(',', ',,')}" for key, value in tree.items())

        assert parse_keyval(text) == (tree, False)

    @given(st.text("ab.01_-=,?é", max_size=12))
    def test_nothing_but_mistakes_is_raised(self, text: str) -> None:
        """Whatever the text, it is a tree or a QmpdError."""
        with contextlib.suppress(QmpdError):
            assert isinstance(parse_keyval(text, "d")[0], dict)


class TestStructOptions:
    """--blockdev, --export, --nbd-server, --object, --monitor: JSON or key=value."""

    def test_both_notations(self) -> None:
        """The source goes with the tree, as the schema treats the two differently."""
        assert meaning("blockdev", "raw,file=a") == Arguments({"driver": "raw", "file": "a"}, KEYVAL)
        assert meaning("export", "nbd,id=e") == Arguments({"type": "nbd", "id": "e"}, KEYVAL)
        assert meaning("nbd-server", "addr.type=unix") == Arguments({"addr": {"type": "unix"}}, KEYVAL)
        assert meaning("object", "secret,id=a") == Arguments({"qom-type": "secret", "id": "a"}, KEYVAL)
        assert meaning("blockdev", "{'driver': 'raw', \"x\": 1} ") == Arguments({"driver": "raw", "x": 1}, WIRE)

    @pytest.mark.parametrize(
        ("value", "text"),
        [
            ("{", "JSON parse error, premature EOI"),
            ('{"a', "JSON parse error, stray '\"a'"),
            ('{"a":1} x', "Expecting at most one JSON value"),
            ('{"a":tru', "JSON parse error, invalid keyword 'tru'"),
            ('{"a":"\udce9"}', "JSON parse error, invalid UTF-8 sequence in string"),
            ("raw,help", "Help is not available for this option"),
            ("a=1,a.b=2", "Parameters 'a.*' used inconsistently"),
        ],
    )
    def test_mistakes(self, value: str, text: str) -> None:
        """As the peer words them."""
        assert mistake("blockdev", value) == text

    def test_the_nbd_server_implies_no_key(self) -> None:
        """Its first item is like the others."""
        assert mistake("nbd-server", "a") == "Expected '=' after parameter 'a'"

    @pytest.mark.parametrize(
        ("value", "monitor"),
        [
            ("c", Monitor("c")),
            ("chardev=c,pretty=on,id=m,mode=control", Monitor("c", True, MonitorMode.CONTROL, "m")),
            ('{"chardev":"c","pretty":true}', Monitor("c", True)),
            ("c,mode=control,mode=readline", Monitor("c", mode=MonitorMode.READLINE)),
        ],
    )
    def test_monitors(self, value: str, monitor: Monitor) -> None:
        """The mode is judged by whoever knows whether the device exists."""
        assert meaning("monitor", value) == monitor

    @pytest.mark.parametrize(
        ("value", "text"),
        [
            ("", "Parameter 'chardev' is missing"),
            ("pretty=on", "Parameter 'chardev' is missing"),
            ("c,mode=x", "Parameter 'mode' does not accept value 'x'"),
            ("c,pretty=1", "Parameter 'pretty' expects 'on' or 'off'"),
            ("c,foo=1", "Parameter 'foo' is unexpected"),
            ("c,pretty", "Expected '=' after parameter 'pretty'"),
            ('{"chardev":"c","pretty":"on"}', "Invalid parameter type for 'pretty', expected: boolean"),
            ("help", "Help is not available for this option"),
        ],
    )
    def test_monitor_mistakes(self, value: str, text: str) -> None:
        """Key=value text is converted, JSON is not."""
        assert mistake("monitor", value) == text

    def test_help_on_objects(self) -> None:
        """The types, or the properties of one, sorted; an unknown type means all types."""
        listing = meaning("object", "help")

        assert isinstance(listing, Show)
        assert listing.status == 0
        assert listing.text.startswith("List of user creatable objects:\n  authz-simple\n  iothread\n")
        assert meaning("object", "1x,help") == listing
        assert meaning("object", "id=a,qom-type=secret,?").text == (
            "secret options:\n  data=<string>\n  file=<string>\n  format=<QCryptoSecretFormat>\n  iv=<string>\n"
            "  keyid=<string>\n"
        )


class TestChardev:
    """The notation of its own."""

    @pytest.mark.parametrize(
        ("value", "chardev"),
        [
            ("null,id=c,path=x", NullChardev("c")),
            ("backend=null,id=a.b_c-d,", NullChardev("a.b_c-d")),
            ("stdio,id=c", StdioChardev("c")),
            ("stdio,id=c,signal=off", StdioChardev("c", signal=False)),
            ("socket,id=c,path=/a,,b,server=on,wait=off", SocketChardev("c", UnixAddress("/a,b"), server=True)),
            ("socket,id=c,path=/s,server=y", SocketChardev("c", UnixAddress("/s"), server=True, wait=True)),
            ("socket,path=/x,path=/s,id=c", SocketChardev("c", UnixAddress("/s"))),
            ("socket,id=c,host=::1,port=4,delay=off", SocketChardev("c", InetAddress("::1", "4"), nodelay=True)),
            ("socket,id=c,port=0,nodelay=on", SocketChardev("c", InetAddress("", "0"), nodelay=True)),
            ("socket,id=c,fd=5,server=on,wait=no", SocketChardev("c", FdAddress(5), server=True)),
            ("socket,id=c,path=/s,telnet=off,mux=off", SocketChardev("c", UnixAddress("/s"))),
            ("null,id=c,rows=-1,size=1.5M", NullChardev("c")),
        ],
    )
    def test_devices(self, value: str, chardev: Any) -> None:
        """The last one of a repeated parameter wins; a server waits unless told not to."""
        assert meaning("chardev", value) == chardev

    def test_the_older_spelling_works_with_a_warning(self) -> None:
        """Flags without a value."""
        (chardev,), told = run("--chardev", "socket,id=c,path=/s,server,nowait,delay")
        start = "qmpd: --chardev socket,id=c,path=/s,server,nowait,delay: warning: short-form boolean option"

        assert chardev == SocketChardev("c", UnixAddress("/s"), server=True)
        assert told.splitlines() == [
            f"{start} 'server' deprecated",
            "Please use server=on instead",
            f"{start} 'nowait' deprecated",
            "Please use wait=off instead",
            f"{start} 'delay' deprecated",
            "Please use nodelay=off instead",
        ]

    @pytest.mark.parametrize(
        ("value", "text"),
        [
            ("", "chardev: no id specified"),
            ("null", "chardev: no id specified"),
            ("id=c", 'chardev: "c" missing backend'),
            ("nope,id=c", "'nope' is not a valid char driver name"),
            ("nope,foo=1", "Invalid parameter 'foo'"),
            ("null,=x", "Invalid parameter ''"),
            ("null, id=c", "Invalid parameter ' id'"),
            ("help=1", "Invalid parameter 'help'"),
            ("null,id=c,wait=x", "Parameter 'wait' expects 'on' or 'off'"),
            ("null,id=c,rows=1k", "Parameter 'rows' expects a number"),
            ("socket,id=c", "Unable to parse FD number "),
            ("socket,id=c,fd=x", "Unable to parse FD number x"),
            ("socket,id=c,host=h", "chardev: socket: no port given"),
            ("socket,id=c,path=/s,fd=1,wait=off", "None or one of 'path', 'fd' or 'host' option required."),
            ("socket,id=c,path=/s,delay=on,nodelay=on", "'delay' and 'nodelay' are mutually exclusive"),
            ("socket,id=c,wait=off", "'wait' option is incompatible with socket in client connect mode"),
            (
                "socket,id=c,path=/s,server=on,reconnect=1",
                "'reconnect' option is incompatible with socket in server listen mode",
            ),
            ("socket,id=c,path=/s,server=on,tls-creds=t", "Parameter 'tls-creds' is not supported"),
            ("null,id=c,mux=on", "Parameter 'mux' is not supported"),
        ],
    )
    def test_mistakes(self, value: str, text: str) -> None:
        """As the peer words them; what qmpd does not have is refused by name."""
        assert mistake("chardev", value) == text

    @pytest.mark.parametrize("value", ["null,id=1c", "null,foo=1,id=_a", "null,id=,help", "null,id=c,,d"])
    def test_the_id_is_looked_at_first(self, value: str) -> None:
        """And a hint says what it may be."""
        assert mistake("chardev", value).splitlines() == [
            "Parameter 'id' expects an identifier",
            "Identifiers consist of letters, digits, '-', '.', '_', starting with a letter.",
        ]

    def test_help(self) -> None:
        """The backends; or all parameters, which the peer counts as a failure."""
        assert meaning("chardev", "help") == Show("Available chardev backend types:\n  null\n  socket\n  stdio\n")
        parameters = meaning("chardev", "socket,help")
        assert parameters.status == 1
        assert "\n  server=<bool (on/off)>\n" in parameters.text

    def test_addresses_are_told_as_the_peer_does(self) -> None:
        """For the line that says who is waited for."""
        addresses = [UnixAddress("/s"), InetAddress("h", "1"), FdAddress(3)]

        assert [str(address) for address in addresses] == ["unix:/s", "tcp:h:1", "fd:3"]


@pytest.mark.parametrize(
    ("value", "trace"),
    [
        ("x", Trace("x")),
        ("enable=x,file=/f", Trace("x")),
        ("events=/f", Trace("")),
        ("", Trace("")),
        ("x*", Trace("x*")),
    ],
)
def test_traces_are_taken_note_of(value: str, trace: Trace) -> None:
    """There are no events, so the daemon has something to say only about one that is named."""
    assert meaning("trace", value) == trace
    assert trace.names_one == (trace.pattern == "x")
    assert mistake("trace", "foo=x") == "Invalid parameter 'foo'"


def test_which_files_may_be_opened_is_known_before_the_options_are_carried_out() -> None:
    """From anywhere on the command line; the peer's options can be shortened as if these did not exist."""
    line = scan(["--tr", "x", "--allow-path", "a", "--blockdev=b", "--allow=c", "--trust-image-names=all"])
    assert (line.allow_paths, line.trust_image_names) == (("a", "c"), True)
    assert [option.name for option in line.options] == ["trace", "blockdev"]
    assert not scan(["--trust-image-names", "none"]).trust_image_names
    with pytest.raises(QmpdError, match="expects 'none' or 'all', not 'some'"):
        scan(["--trust-image-names", "some"])


def test_what_is_done_about_siblings_is_known_as_well(tmp_path: Path) -> None:
    """Directories are absolute, for the daemon may change its own; one that does not exist would protect nothing."""
    line = scan(["--siblings", "warn", "--image-dir", str(tmp_path), "--image-dir=."])
    assert (line.siblings, line.image_dirs) == ("warn", (str(tmp_path), os.getcwd()))
    assert scan([]).siblings == "refuse"
    with pytest.raises(QmpdError, match="expects 'refuse', 'warn' or 'allow', not 'ask'"):
        scan(["--siblings=ask"])
    with pytest.raises(QmpdError, match="expects a directory"):
        scan(["--image-dir", str(tmp_path / "gone")])
