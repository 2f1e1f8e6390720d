"""The daemon as a process: start-up in order, what a failure leaves behind, signals, the end.

Source: spec/qmp-protocol.md sections 12 to 15.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from qmpd import daemon
from tests.daemons import PATIENCE, Client, CommandError, under_test

PROGRAM = under_test()

SERVER = "socket,id=c,path=s,server=on,wait=off"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Relative names, since socket paths are short."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@contextmanager
def started(*words: str) -> Iterator[subprocess.Popen[str]]:
    """A daemon with these options; killed if it is still there at the end."""
    process = subprocess.Popen(
        [*PROGRAM.argv, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def connect(path: str = "s") -> socket.socket:
    """Connect to a daemon that has bound ``path`` or is about to."""
    for _attempt in range(int(PATIENCE * 100)):
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(PATIENCE)
        try:
            sock.connect(path)
        except OSError:
            sock.close()
            signal.sigtimedwait([], 0.01)
        else:
            return sock
    raise AssertionError(f"nobody listens at {path}")


@contextmanager
def client(path: str = "s") -> Iterator[Client]:
    """A negotiated client."""
    with closing(Client(connect(path))) as made:
        yield made


def fails(*words: str) -> str:
    """Standard error of a command line that fails, without the program's name; the status is 1."""
    done = PROGRAM.run(*words)

    assert (done.returncode, done.stdout) == (1, "")
    name, _colon, text = done.stderr.partition(": ")
    assert name == PROGRAM.name
    return text


def test_several_clients_are_served_on_one_socket() -> None:
    """Each is greeted although the others are still there; quit ends the process with status 0, its socket gone."""
    with started("--chardev", SERVER, "--monitor", "c") as process, client() as one, client() as two:
        assert one.execute("query-version") == two.execute("query-version")
        one.execute("quit")
        assert two.rest() == b""
        assert process.wait(PATIENCE) == 0
        assert process.stderr is not None
        assert process.stderr.read() == ""
    assert not os.path.exists("s")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_it_cleanly(number: signal.Signals) -> None:
    """Status 0, nothing said, socket and pid file gone."""
    with started("--chardev", SERVER, "--monitor", "c", "--pidfile", "p") as process, client() as one:
        assert Path("p").read_text() == f"{process.pid}\n"
        process.send_signal(number)
        assert one.rest() == b""
        assert process.wait(PATIENCE) == 0
        assert process.stderr is not None
        assert process.stderr.read() == ""
    assert os.listdir() == []


def test_other_signals_do_not_end_it() -> None:
    """SIGPIPE and SIGUSR1."""
    with started("--chardev", SERVER, "--monitor", "c") as process, client() as one:
        process.send_signal(signal.SIGPIPE)
        process.send_signal(signal.SIGUSR1)
        assert one.execute("query-version")


def test_options_are_carried_out_from_left_to_right() -> None:
    """Nodes and objects come before the first client; their names are those of the command line."""
    Path("a.img").write_bytes(bytes(1 << 20))
    options = (
        *("--object", "secret,id=s0,data=x"),
        *("--blockdev", "driver=file,filename=a.img,node-name=f"),
        *("--blockdev", '{"driver": "raw", "node-name": "r", "file": "f"}'),
        *("--chardev", SERVER, "--monitor", "c"),
    )
    with started(*options), client() as one:
        assert [node["node-name"] for node in one.execute("query-named-block-nodes")] == ["r", "f"]
        assert {"name": "s0", "type": "child<secret>"} in one.execute("qom-list", path="/objects")
        assert {"name": "c", "type": "child<chardev-socket>"} in one.execute("qom-list", path="/chardevs")


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--monitor", "c", "--chardev", "null,id=c"], '--monitor c: chardev "c" not found\n'),
        (
            ["--chardev", "null,id=c", "--monitor", "c", "--monitor", "chardev=c"],
            "--monitor chardev=c: chardev 'c' is already in use\n",
        ),
        (
            ["--chardev", "null,id=c", "--monitor", "c,mode=readline"],
            "--monitor c,mode=readline: Only QMP is supported\n",
        ),
        (
            ["--chardev", "null,id=c", "--chardev=null,id=c"],
            "--chardev=null,id=c: attempt to add duplicate property 'c' to object (type 'container')\n",
        ),
        (["--chardev", SERVER, "--chardev", SERVER], f"--chardev {SERVER}: duplicate yank instance\n"),
        (
            ["--chardev", "stdio,id=a", "--chardev", "stdio,id=b"],
            "--chardev stdio,id=b: cannot use stdio by multiple character devices\n",
        ),
        (
            ["--chardev", "socket,id=c,path=nope"],
            "--chardev socket,id=c,path=nope: Failed to connect to 'nope': No such file or directory\n",
        ),
        (
            ["--blockdev", "driver=file,filename=nope,node-name=n"],
            "--blockdev driver=file,filename=nope,node-name=n: Could not open 'nope': No such file or directory\n",
        ),
        (
            ["--object", "iothread,id=x,poll-max-ns=a"],
            "--object iothread,id=x,poll-max-ns=a: Parameter 'poll-max-ns' expects integer\n",
        ),
        (
            ["--object", "iothread,id=0"],
            "--object iothread,id=0: Parameter 'id' expects an identifier\n"
            "Identifiers consist of letters, digits, '-', '.', '_', starting with a letter.\n",
        ),
        (["--pidfile", "/nope/p"], "cannot create PID file: Could not create '/nope/p': No such file or directory\n"),
        (["--nope"], "unrecognized option '--nope'\n"),
    ],
)
def test_mistakes_read_as_the_peers(words: list[str], text: str, capfd: pytest.CaptureFixture[str]) -> None:
    """One message, status 1, and nothing is left behind. (Without a process of its own: there are many.)"""
    assert daemon.main(words) == 1
    assert capfd.readouterr() == ("", f"{daemon.PROGRAM}: {text}")
    assert os.listdir() == []


def test_a_long_socket_path_is_refused_with_a_hint() -> None:
    """The kernel's limit."""
    path = "x" * 108

    assert fails("--chardev", f"socket,id=c,path={path},server=on,wait=off").splitlines()[-2:] == [
        f"--chardev socket,id=c,path={path},server=on,wait=off: UNIX socket path '{path}' is too long",
        "Path must be less than 108 bytes",
    ]


def test_a_live_daemons_socket_survives_a_second_start() -> None:
    """The peer unlinks it."""
    with started("--chardev", SERVER, "--monitor", "c"), client() as one:
        assert fails("--chardev", SERVER) == f"--chardev {SERVER}: Failed to bind socket to s: Address already in use\n"
        with client() as two:
            assert one.execute("query-jobs") == two.execute("query-jobs") == []


def test_a_killed_daemons_socket_is_replaced() -> None:
    """A restart after SIGKILL."""
    with started("--chardev", SERVER, "--monitor", "c") as process, client():
        process.kill()
        process.wait(PATIENCE)
    assert os.path.exists("s")
    with started("--chardev", SERVER, "--monitor", "c"), client() as one:
        assert one.execute("query-jobs") == []


def test_a_held_pid_file_stops_a_second_daemon() -> None:
    """Before it has touched anything that matters."""
    with started("--chardev", SERVER, "--monitor", "c", "--pidfile", "p") as process, client():
        assert fails("--pidfile", "p") == (
            "cannot create PID file: Cannot lock pid file: Resource temporarily unavailable\n"
        )
        assert Path("p").read_text() == f"{process.pid}\n"


def test_wait_holds_up_start_up_until_a_client_has_come() -> None:
    """With a line on standard error; the options behind are carried out afterwards."""
    waiting = "socket,id=c,path=s,server=on"
    with started("--chardev", waiting, "--monitor", "c", "--pidfile", "p") as process:
        assert process.stderr is not None
        assert process.stderr.readline() == (
            f"{PROGRAM.name}: --chardev {waiting}: info: QEMU waiting for connection on: "
            "disconnected:unix:s,server=on\n"
        )
        assert not os.path.exists("p")
        with client() as one:
            assert one.execute("query-jobs") == []
            assert os.path.exists("p")
        with client() as later:
            assert later.execute("query-jobs") == []


def test_a_signal_while_it_waits_ends_it_cleanly() -> None:
    """Nothing is left behind."""
    with started("--chardev", "socket,id=c,path=s,server=on", "--monitor", "c") as process:
        assert process.stderr is not None
        process.stderr.readline()
        process.terminate()
        assert process.wait(PATIENCE) == 0
    assert os.listdir() == []


def test_stdio_is_a_monitor_and_its_end_is_not_the_daemons() -> None:
    """EOF closes the conversation only."""
    with started("--chardev", "stdio,id=c", "--monitor", "c", "--pidfile", "p") as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert "QMP" in json.loads(process.stdout.readline())
        process.stdin.write('{"execute":"qmp_capabilities"}{"execute":"query-jobs"}')
        process.stdin.close()
        assert json.loads(process.stdout.readline()) == {"return": {}}
        assert json.loads(process.stdout.readline()) == {"return": []}
        process.stdin = None
        assert process.poll() is None


def test_an_inherited_socket_is_served() -> None:
    """As a service manager hands it over; the file is the manager's and stays."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("s")
        server.listen()
        fd = server.fileno()
        process = subprocess.Popen(
            [*PROGRAM.argv, "--chardev", f"socket,id=c,fd={fd},server=on,wait=off", "--monitor", "c"], pass_fds=[fd]
        )
        with process:
            with client() as one, client() as two:
                assert two.execute("query-jobs") == []
                one.execute("quit")
            assert process.wait(PATIENCE) == 0
    assert os.path.exists("s")


def test_it_can_be_the_connecting_side() -> None:
    """The default of --chardev socket: the manager listens."""
    with socket.socket(socket.AF_UNIX) as manager:
        manager.bind("s")
        manager.listen()
        manager.settimeout(PATIENCE)
        with started("--chardev", "socket,id=c,path=s", "--monitor", "c") as process:
            sock, _address = manager.accept()
            sock.settimeout(PATIENCE)
            with closing(Client(sock)) as one:
                one.execute("quit")
            assert process.wait(PATIENCE) == 0


def test_tcp() -> None:
    """A port that the test has found free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = ("--chardev", f"socket,id=c,host=127.0.0.1,port={port},server=on,wait=off", "--monitor", "c")
    with started(*options, "--chardev", "socket,id=d,path=s,server=on,wait=off"):
        connect().close()  # bound after the port
        sock = socket.create_connection(("127.0.0.1", port), PATIENCE)
        with closing(Client(sock)) as one:
            assert one.execute("query-jobs") == []


def test_daemonize_returns_when_all_is_set_up() -> None:
    """The parent ends with 0 and says nothing; the daemon has its pid file and no terminal."""
    Path("a.img").write_bytes(bytes(1 << 20))
    done = PROGRAM.run(
        *("--blockdev", "driver=file,filename=a.img,node-name=f", "--chardev", SERVER, "--monitor", "c"),
        *("--pidfile", "p", "--daemonize"),
    )
    pid = int(Path("p").read_text())
    with client() as one:
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert os.readlink(f"/proc/{pid}/cwd") == "/"
        assert {os.readlink(f"/proc/{pid}/fd/{fd}") for fd in (0, 1, 2)} == {"/dev/null"}
        assert os.getsid(pid) == pid
        assert os.stat("s").st_mode & 0o777 == 0o750
        one.execute("quit")
        assert one.rest() == b""
    for _attempt in range(int(PATIENCE * 100)):
        if os.listdir() == ["a.img"]:
            break
        signal.sigtimedwait([], 0.01)
    assert os.listdir() == ["a.img"]


def test_daemonize_reports_a_failure() -> None:
    """On the parent's standard error, with status 1."""
    assert fails("--daemonize", "--chardev", "socket,id=c,path=nope") == (
        "--chardev socket,id=c,path=nope: Failed to connect to 'nope': No such file or directory\n"
    )
    assert fails("--daemonize", "--chardev", "stdio,id=c") == (
        "--chardev stdio,id=c: cannot use stdio with -daemonize\n"
    )


def _refusal(one: Client, path: str) -> str:
    """The text that adding a file which cannot be a disk is refused with."""
    with pytest.raises(CommandError) as caught:
        one.execute("blockdev-add", driver="file", node_name="f", filename=path, read_only=True)
    return str(caught.value)


def test_clients_beyond_the_descriptor_limit_wait_and_harm_nobody() -> None:
    """The one that takes the last descriptor included; those that wait are served when others have left."""
    with started("--chardev", SERVER, "--monitor", "c") as process, client() as one:
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (40, 40))
        crowd = [connect() for _ in range(60)]
        try:
            # The daemon takes them as it comes to them: only then is there no descriptor left for a file.
            texts = (_refusal(one, "/proc/version") for _ in range(10_000))
            assert any("Too many open files" in text for text in texts)
            assert one.execute("query-jobs") == []
        finally:
            for sock in crowd:
                sock.close()
        with client() as other:
            assert other.execute("query-jobs") == []


def test_a_socket_without_a_name_is_no_file() -> None:
    """The kernel chooses a name; at the end there is nothing to remove."""
    with started("--chardev", "socket,id=n,path=,server=on,wait=off", "--chardev", SERVER, "--monitor", "c") as process:
        with client() as one:
            one.execute("quit")
        assert process.wait(PATIENCE) == 0


def test_help_prints_and_ends() -> None:
    """At its place on the command line."""
    done = PROGRAM.run("--chardev", "null,id=c", "--object", "iothread,help", "--nonsense-is-not-reached=1")
    helped = PROGRAM.run("--chardev", "null,id=c", "--object", "iothread,help", "--chardev", "nope,id=x")

    assert done.returncode == 1
    assert (helped.returncode, helped.stderr) == (0, "")
    assert "poll-max-ns=<int>" in helped.stdout


def test_an_unknown_trace_event_is_only_a_warning() -> None:
    """There are none."""
    assert fails("--trace", "x", "--monitor", "c") == (
        f"--trace x: warning: trace event 'x' does not exist\n{PROGRAM.name}: --monitor c: chardev \"c\" not found\n"
    )
