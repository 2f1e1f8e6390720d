"""Encrypted servers, and the other kinds of address, with the clients that people use."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.daemons import CommandError
from tests.exports import wire
from tests.exports.serving import Server, free_port, run, serving
from tests.tools import need

_DAYS = ("-days", "2", "-nodes", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256")


def authority(directory: Path, name: str) -> Path:
    """A directory with a certificate authority, its certificate where GnuTLS's users look for it."""
    need("openssl")
    place = directory / name
    place.mkdir()
    files = ("-keyout", place / "ca-key.pem", "-out", place / "ca-cert.pem")
    run("openssl", "req", "-x509", *_DAYS, "-subj", f"/CN={name}", *files)
    return place


def issue(place: Path, kind: str, common_name: str) -> None:
    """A certificate of that authority for a ``server`` or a ``client``, beside it."""
    request, extensions = place / f"{kind}.csr", place / f"{kind}.ext"
    usage = {"server": "serverAuth", "client": "clientAuth"}[kind]
    extensions.write_text(f"extendedKeyUsage={usage}\nsubjectAltName=DNS:localhost,IP:127.0.0.1,IP:::1\n")
    key = ("-keyout", place / f"{kind}-key.pem", "-out", request)
    run("openssl", "req", "-new", *_DAYS[2:], "-subj", f"/CN={common_name}", *key)
    signed = ("-CA", place / "ca-cert.pem", "-CAkey", place / "ca-key.pem", "-CAcreateserial", "-days", "2")
    run("openssl", "x509", "-req", "-in", request, *signed, "-extfile", extensions, "-out", place / f"{kind}-cert.pem")


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``ours``: the server's authority and its client; ``bare``: that authority alone; ``theirs``: all another's."""
    directory = tmp_path_factory.mktemp("certificates")
    for name in ("ours", "theirs"):
        place = authority(directory, name)
        issue(place, "server", "localhost")
        issue(place, "client", f"client of {name}")
    (directory / "bare").mkdir()
    (directory / "bare" / "ca-cert.pem").write_bytes((directory / "ours" / "ca-cert.pem").read_bytes())
    return directory


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """A daemon whose NBD server does not run yet, to be on a port."""
    with serving(tmp_path, tcp=True, listen=False) as server:
        yield server


def listen(server: Server, certificates: Path, *, verify_peer: bool, authz: str | None = None) -> None:
    """Encrypted, with an export called ``qcow2``."""
    creds = {"qom-type": "tls-creds-x509", "id": "tls0", "dir": str(certificates / "ours"), "endpoint": "server"}
    server.client.execute_with("object-add", creds | {"verify-peer": verify_peer})
    more = {}
    if authz is not None:
        server.client.execute_with("object-add", {"qom-type": "authz-simple", "id": "auth0", "identity": authz})
        more["tls_authz"] = "auth0"
    server.listen(tls_creds="tls0", **more)
    server.serve("qcow2")


def attempt(server: Server, certificates: Path | None) -> subprocess.CompletedProcess[str]:
    """qemu-img looks at the export, with the certificates of that directory or in the clear."""
    need("qemu-img")
    target = f"driver=nbd,host=localhost,port={server.port},export=qcow2"
    argv = ["qemu-img", "info", "--image-opts"]
    if certificates is not None:
        argv += ["--object", f"tls-creds-x509,id=c0,dir={certificates},endpoint=client"]
        target += ",tls-creds=c0"
    return subprocess.run([*argv, target], capture_output=True, text=True, timeout=60)


def refused(server: Server, certificates: Path | None) -> str:
    """What qemu-img says; the daemon is none the worse."""
    done = attempt(server, certificates)
    assert done.returncode != 0, done.stdout
    server.alive()
    assert "Traceback" not in server.daemon.stderr()
    return done.stderr


def test_every_byte_goes_through_an_encrypted_connection(server: Server, certificates: Path, tmp_path: Path) -> None:
    """nbdcopy out, and into another export over many requests in flight."""
    need("nbdcopy", "qemu-img")
    listen(server, certificates, verify_peer=False)
    files = server.serve("raw")
    query = f"?tls-certificates={certificates / 'bare'}"
    run("nbdcopy", f"nbds://localhost:{server.port}/qcow2{query}", tmp_path / "out.raw")
    run("qemu-img", "compare", "-U", "-f", "qcow2", "-F", "raw", tmp_path / "qcow20.qcow2", tmp_path / "out.raw")
    run("nbdcopy", tmp_path / "out.raw", f"nbds://localhost:{server.port}/raw{query}")
    server.client.execute("block-export-del", id="raw", mode="hard")
    run("qemu-img", "compare", "-U", "-f", "raw", "-F", "raw", files[0], tmp_path / "out.raw")


def test_a_client_in_the_clear_is_refused(server: Server, certificates: Path) -> None:
    listen(server, certificates, verify_peer=False)
    assert "server requires TLS" in refused(server, None) or "TLS negotiation required" in refused(server, None)
    with server.dial() as sock:
        assert sock.recv(16) == b"NBDMAGICIHAVEOPT"
    assert attempt(server, certificates / "bare").returncode == 0


def test_a_client_that_trusts_another_authority_goes_away(server: Server, certificates: Path) -> None:
    listen(server, certificates, verify_peer=False)
    assert "certificate" in refused(server, certificates / "theirs").lower()
    assert attempt(server, certificates / "bare").returncode == 0


def test_clients_must_show_a_certificate_where_that_is_asked(server: Server, certificates: Path) -> None:
    """One of the same authority: none at all, and that of another one, will not do."""
    listen(server, certificates, verify_peer=True)
    assert attempt(server, certificates / "ours").returncode == 0
    refused(server, certificates / "bare")
    mixed = certificates / "mixed"
    if not mixed.exists():
        mixed.mkdir()
        for name, source in (("ca-cert.pem", "ours"), ("client-cert.pem", "theirs"), ("client-key.pem", "theirs")):
            (mixed / name).write_bytes((certificates / source / name).read_bytes())
    refused(server, mixed)
    assert attempt(server, certificates / "ours").returncode == 0


@pytest.mark.parametrize(("identity", "lets_in"), [("CN=client of ours", True), ("CN=somebody else", False)])
def test_only_who_is_named_is_let_in(server: Server, certificates: Path, identity: str, lets_in: bool) -> None:
    listen(server, certificates, verify_peer=True, authz=identity)
    if lets_in:
        assert attempt(server, certificates / "ours").returncode == 0
    else:
        refused(server, certificates / "ours")


@pytest.mark.parametrize("rubbish", [b"\x16\x03\x01" + bytes(200), b"GET / HTTP/1.0\r\n\r\n", bytes(70000)])
def test_rubbish_instead_of_a_tls_handshake(server: Server, certificates: Path, rubbish: bytes) -> None:
    """The connection is closed; the next client is served."""
    listen(server, certificates, verify_peer=False)
    with server.dial() as sock:
        assert sock.recv(18)[:8] == b"NBDMAGIC"
        sock.sendall(b"\0\0\0\3" + wire.option(5))
        assert len(sock.recv(20)) == 20
        try:
            sock.sendall(rubbish)
            sock.shutdown(socket.SHUT_WR)
            while sock.recv(4096):
                pass
        except (ConnectionResetError, BrokenPipeError):
            pass
    assert attempt(server, certificates / "bare").returncode == 0
    assert "Traceback" not in server.daemon.stderr()


def test_a_directory_without_certificates_is_refused(server: Server, tmp_path: Path) -> None:
    creds = {"qom-type": "tls-creds-x509", "id": "tls0", "dir": str(tmp_path / "nowhere"), "endpoint": "server"}
    with pytest.raises(CommandError, match="No such file or directory"):
        server.client.execute_with("object-add", creds)


# -- addresses ---------------------------------------------------------------------------------------------------------


def test_a_port_of_ipv6(tmp_path: Path) -> None:
    need("nbdinfo")
    if not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    with serving(tmp_path, listen=False) as server:
        port = free_port()
        inet = {"type": "inet", "data": {"host": "::1", "port": str(port)}}
        server.client.execute("nbd-server-start", addr=inet)
        server.serve("qcow2")
        assert run("nbdinfo", "--size", f"nbd://[::1]:{port}/qcow2").strip() == str(4 << 20)
        with socket.socket(socket.AF_INET) as other:
            assert other.connect_ex(("127.0.0.1", port)) != 0


def test_all_addresses_of_the_machine(tmp_path: Path) -> None:
    """An empty host means everybody, by either protocol."""
    need("nbdinfo")
    with serving(tmp_path, listen=False) as server:
        port = free_port()
        server.client.execute("nbd-server-start", addr={"type": "inet", "data": {"host": "", "port": str(port)}})
        server.serve("qcow2")
        for host in ("127.0.0.1", "[::1]"):
            assert run("nbdinfo", "--size", f"nbd://{host}:{port}/qcow2").strip() == str(4 << 20)


def test_an_abstract_socket(tmp_path: Path) -> None:
    """It has a name but no file."""
    with serving(tmp_path, listen=False) as server:
        name = f"qmpd-test-{server.daemon.process.pid}"
        data = {"path": name, "abstract": True, "tight": True}
        server.client.execute("nbd-server-start", addr={"type": "unix", "data": data})
        server.serve("qcow2")
        assert not (tmp_path / name).exists()
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(20)
        sock.connect("\0" + name)
        with wire.connection(sock) as connection:
            connection.enter("qcow2", structured=True)
            answer = connection.call(wire.request(wire.READ, 64 << 10, 512, cookie=1), 512)
            assert answer == wire.Answer(1, 0, b"\x21" * 512)
