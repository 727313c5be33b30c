"""A trunk by TLS: who gets through at all, and what each role may call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from click.testing import Result
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from grpc_health.v1 import health_pb2, health_pb2_grpc
from typer.testing import CliRunner

from clients.connection import TrunkConnection
from contract import trunk_pb2 as pb
from contract.certificates import Party, Role, read_certificates
from contract.errors import AccessError, ConfigError, ConnectionFailedError
from contract.records import RoundKey
from contract.tls import TlsFiles
from contract.trunk_pb2_grpc import TrunkStub
from orchestrator import authority
from orchestrator.trunk import Trunk
from server_trunk.access import ALLOWED, require_role
from server_trunk.cli import app
from server_trunk.port import check_listen
from server_trunk.status import ask
from tests.pki import Pki
from tests.server_trunk.conftest import CUT, RunningTrunk, ServeOptions, running
from tests.server_trunk.wire_client import Refused, WireClient

_KEY = RoundKey("a-run", 1, 1)
NAMES = {Role.CLIENT: "north", Role.ORCHESTRATOR: "orchestrator", Role.OPERATOR: "operator"}


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki.made(tmp_path_factory.mktemp("keys") / "pki")


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    """Another authority, whose certificates bear the same names."""
    return Pki.made(tmp_path_factory.mktemp("keys") / "others")


@pytest.fixture(scope="module")
def secured(model_dir: Path, pki: Pki, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningTrunk]:
    state = tmp_path_factory.mktemp("state")
    with running(options_by(model_dir, state, pki.files("trunk"))) as trunk:
        yield trunk


def options_by(model_dir: Path, state: Path, tls: TlsFiles) -> ServeOptions:
    return ServeOptions(str(model_dir), CUT, "127.0.0.1:0", state, device="cpu", batch_tokens=512, tls=tls)


def described(address: str, credentials: grpc.ChannelCredentials | None) -> grpc.RpcError | pb.TrunkDescription:
    channel = grpc.insecure_channel(address) if credentials is None else grpc.secure_channel(address, credentials)
    with channel:
        try:
            answer: pb.TrunkDescription = TrunkStub(channel).Describe(pb.DescribeRequest(), timeout=30)
        except grpc.RpcError as error:
            return error
    return answer


def test_a_certificate_of_the_clients_ca_gets_through_and_nothing_else_does(
    secured: RunningTrunk, pki: Pki, tmp_path: Path
) -> None:
    assert isinstance(described(secured.address, pki.unchecked("north")), pb.TrunkDescription)
    for what, credentials in pki.refused(tmp_path).items():
        error = described(secured.address, credentials)
        assert isinstance(error, grpc.RpcError), what
        assert error.code() is grpc.StatusCode.UNAVAILABLE, what


def test_an_expired_certificate_of_the_right_ca_is_refused_by_the_trunk_itself(model_dir: Path, tmp_path: Path) -> None:
    """By its own clock, whatever the caller thinks: the CA is good, the certificate was."""
    now = datetime.now(UTC)
    found = authority.create_authority(tmp_path / "pki", now - timedelta(days=2), 30)
    authority.issue(found, Party(Role.TRUNK, "trunk"), [], now, 7)
    authority.issue(found, Party(Role.CLIENT, "north"), [], now - timedelta(days=2), 1)
    pki = Pki(tmp_path / "pki")
    with running(options_by(model_dir, tmp_path / "state", pki.files("trunk"))) as trunk:
        error = described(trunk.address, pki.unchecked("north"))
        assert isinstance(error, grpc.RpcError)
        assert error.code() is grpc.StatusCode.UNAVAILABLE
    with pytest.raises(ConfigError, match=r"north.pem expired at .* UTC: get a new one"):
        TrunkConnection(trunk.address, tls=pki.files("north"))


CALLS: dict[str, Callable[[WireClient], Any]] = {
    "Describe": lambda client: client.call("Describe", pb.DescribeRequest()),
    "Session": lambda client: client.session(pb.Hello(codecs=["identity"])),
    "PutAdapter": lambda client: client.put_adapter("0" * 64, b"x"),
    "GetAdapter": lambda client: client.get_adapter("0" * 64),
    "CommitRound": lambda client: client.call("CommitRound", pb.CommitRoundRequest()),
    "Progress": lambda client: client.call("Progress", pb.RoundId()),
    "EndBefore": lambda client: client.call("EndBefore", pb.RoundId()),
}


def test_every_method_of_the_service_has_its_roles() -> None:
    services = pb.DESCRIPTOR.services_by_name.values()
    assert set(ALLOWED) == {f"/{service.full_name}/{method.name}" for service in services for method in service.methods}
    assert set(CALLS) == {method.name for method in pb.DESCRIPTOR.services_by_name["Trunk"].methods}


@pytest.mark.parametrize("role", list(NAMES))
@pytest.mark.parametrize("method", list(CALLS))
def test_a_role_calls_what_it_may_and_is_told_who_may_where_it_may_not(
    secured: RunningTrunk, pki: Pki, method: str, role: Role
) -> None:
    client, allowed = WireClient(secured.address, pki.files(NAMES[role])), ALLOWED[f"/trunkline.v1.Trunk/{method}"]
    refused = refusal(lambda: CALLS[method](client))
    client.close()
    if role in allowed:
        assert refused is None or refused.error is not AccessError
        return
    assert refused is not None
    assert (refused.status, refused.error) == (grpc.StatusCode.PERMISSION_DENIED, AccessError)
    needed = " or ".join(one.value for one in Role if one in allowed)
    told = f"{method} is for {needed}; the caller's certificate is of role {role.value}, {NAMES[role]}"
    assert refused.line == told


def refusal(call: Callable[[], object]) -> Refused | None:
    """How `call` was refused, for whatever reason."""
    try:
        call()
    except Refused as refused:
        return refused
    return None


def shown(*certificates: x509.Certificate) -> dict[str, list[bytes]]:
    """As gRPC tells of a caller."""
    return {"x509_pem_cert": [one.public_bytes(Encoding.PEM) for one in certificates]}


@pytest.mark.parametrize("role", list(Role))
@pytest.mark.parametrize("method", [*ALLOWED, "/trunkline.v1.Trunk/AddedOneDay", "/trunkline.v2.Other/Describe"])
def test_what_is_not_listed_is_nobodys(pki: Pki, method: str, role: Role) -> None:
    name = NAMES.get(role, "trunk")
    (certificate,) = read_certificates(pki.files(name).certificate)
    held = Role.TRUNK if name == "trunk" else role
    if held in ALLOWED.get(method, ()):
        require_role(shown(certificate), method)
        return
    with pytest.raises(AccessError, match=r"is for (nobody|[a-z ]+);"):
        require_role(shown(certificate), method)
    with pytest.raises(AccessError, match="the caller showed no certificate"):
        require_role({}, method)


def test_a_certificate_without_a_role_may_look_after_the_trunks_health_and_nothing_else(
    secured: RunningTrunk, pki: Pki
) -> None:
    unnamed = without_a_role(pki)
    with grpc.secure_channel(secured.address, unnamed) as channel:
        asked = health_pb2.HealthCheckRequest()
        assert health_pb2_grpc.HealthStub(channel).Check(asked, timeout=30).status == 1
        with pytest.raises(grpc.RpcError) as refused:
            TrunkStub(channel).Describe(pb.DescribeRequest(), timeout=30)
    assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED
    assert "the caller's certificate names no role" in refused.value.details()


def without_a_role(pki: Pki) -> grpc.ChannelCredentials:
    """As an organisation's CA may have signed one for something else."""
    found, key, now = authority.open_authority(pki.folder), ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    builder = x509.CertificateBuilder().subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "monitor")]))
    builder = builder.issuer_name(found.certificate.subject).public_key(key.public_key())
    builder = builder.serial_number(x509.random_serial_number()).not_valid_before(now - timedelta(minutes=1))
    certificate = builder.not_valid_after(now + timedelta(days=1)).sign(found.key, hashes.SHA256())
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return grpc.ssl_channel_credentials(pki.ca.read_bytes(), pem, certificate.public_bytes(Encoding.PEM))


# ---- what is told to who comes in a wrong way ------------------------------------------------------------------------


def test_a_client_without_tls_is_told_that_it_is_wanted(secured: RunningTrunk) -> None:
    with pytest.raises(ConnectionFailedError, match="if it serves by TLS, it must be asked by TLS"):
        TrunkConnection(secured.address).describe()
    with pytest.raises(ConnectionFailedError, match="if it serves by TLS, it must be asked by TLS"):
        Trunk(secured.address).describe()


def test_a_client_by_tls_never_falls_back_and_is_told_that_the_trunk_has_none(trunk: RunningTrunk, pki: Pki) -> None:
    with pytest.raises(ConnectionFailedError, match="does not speak TLS"):
        TrunkConnection(trunk.address, tls=pki.files("north")).describe()
    with pytest.raises(ConnectionFailedError, match="does not speak TLS"):
        Trunk(trunk.address, tls=pki.files("orchestrator")).describe()


def test_a_trunk_of_another_ca_and_one_that_refuses_are_told_apart(
    secured: RunningTrunk, pki: Pki, others: Pki
) -> None:
    with pytest.raises(ConnectionFailedError, match="by TLS: CERTIFICATE_VERIFY_FAILED: unable to get local issuer"):
        TrunkConnection(secured.address, tls=pki.files("north", ca=others.ca)).describe()
    with pytest.raises(ConnectionFailedError, match="its client CA may not vouch for the certificate shown"):
        TrunkConnection(secured.address, tls=others.files("north", ca=pki.ca)).describe()
    with pytest.raises(AccessError, match="CommitRound is for orchestrator"):
        Trunk(secured.address, tls=pki.files("north")).commit_round(_KEY, "0" * 64, [])


def test_a_client_certificate_serves_nobody(model_dir: Path, pki: Pki, tmp_path: Path) -> None:
    """Whoever holds a client's key cannot stand in the trunk's place."""
    with running(options_by(model_dir, tmp_path, pki.files("south"))) as impostor:
        with pytest.raises(ConnectionFailedError, match="by TLS: CERTIFICATE_VERIFY_FAILED: unsupported certificate"):
            TrunkConnection(impostor.address, tls=pki.files("north")).describe()


def test_status_asks_by_the_operators_certificate_by_option_or_by_environment(
    secured: RunningTrunk, pki: Pki, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ask(secured.address, pki.files("operator")).ready
    files = pki.files("operator")
    options = ["--ca", str(files.ca), "--certificate", str(files.certificate), "--key", str(files.key)]
    for name, value in zip(("CA", "CERTIFICATE", "KEY"), options[1::2], strict=True):
        monkeypatch.setenv(f"TRUNKLINE_TRUNK_{name}", value)
    by_environment = CliRunner().invoke(app, ["status", secured.address])
    assert by_environment.exit_code == 0, by_environment.stderr
    monkeypatch.delenv("TRUNKLINE_TRUNK_KEY")
    half = CliRunner().invoke(app, ["status", secured.address])
    assert half.exit_code == 2
    assert "--ca and --certificate are given without --key" in " ".join(half.stderr.split())
    by_options = CliRunner().invoke(app, ["status", secured.address, *options])
    assert by_options.exit_code == 0, by_options.stderr


@pytest.mark.parametrize("arguments", [["sessions"], ["drain", "--dry-run"], ["drain", "--yes", "--grace-s", "0"]])
def test_an_operators_certificate_lists_sessions_and_drains_and_nobody_elses_does(
    model_dir: Path, pki: Pki, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    monkeypatch.setenv("TRUNKLINE_HOME", str(tmp_path / "home"))
    with running(options_by(model_dir, tmp_path / "state", pki.files("trunk"))) as trunk:

        def asked(files: TlsFiles | None) -> Result:
            shown = ("--ca", files.ca, "--certificate", files.certificate, "--key", files.key) if files else ()
            return CliRunner().invoke(app, [*arguments, trunk.address, *map(str, shown)])

        for role in (Role.CLIENT, Role.ORCHESTRATOR):
            refused = asked(pki.files(NAMES[role]))
            assert refused.exit_code == AccessError.exit_code, refused.stderr
            assert f"is for operator; the caller's certificate is of role {role.value}" in refused.stderr
        assert asked(None).exit_code == ConnectionFailedError.exit_code
        assert not trunk.server.told_to_end.is_set()
        done = asked(pki.files("operator"))
        assert done.exit_code == 0, done.stderr
        assert trunk.server.told_to_end.is_set() == ("--yes" in arguments)


# ---- the command line ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["0.0.0.0", "trunk.example", "[::]", "10.0.0.7"])
def test_listening_elsewhere_needs_tls_or_a_flag_and_tickets_need_tls(host: str) -> None:
    listen = f"{host}:50051"
    assert check_listen(listen, False, tls=True, tickets=True)[1] == 50051
    assert check_listen(listen, True)[1] == 50051
    with pytest.raises(ConfigError, match="there is no TLS: give --tls-certificate, --tls-key and --client-ca"):
        check_listen(listen, False)
    for insecure in (False, True):
        with pytest.raises(ConfigError, match="ticket-signer is given, and listen is"):
            check_listen(listen, insecure, tickets=True)
    assert check_listen("127.0.0.1:50051", False, tickets=True) == ("127.0.0.1", 50051)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--tls-certificate", "CERT"], "--tls-certificate is given without --client-ca and --tls-key"),
        (["--tls-certificate", "CERT", "--tls-key", "KEY"], "are given without --client-ca"),
        (["--tls-certificate", "CERT", "--tls-key", "CAKEY", "--client-ca", "CA"], "ca.key is not that of the cert"),
        (["--tls-certificate", "CERT", "--tls-key", "KEY", "--client-ca", "CERT"], "is not a certificate authority's"),
        (
            ["--tls-certificate", "KEY", "--tls-key", "KEY", "--client-ca", "CA"],
            "holds no certificate in PEM",
        ),
        (["--ticket-signer", "ed25519:nonsense"], "ticket-signer is"),
    ],
)
def test_a_trunk_that_cannot_serve_by_tls_as_told_does_not_serve(
    model_dir: Path, pki: Pki, arguments: list[str], told: str
) -> None:
    files = pki.files("trunk")
    places = {"CERT": files.certificate, "KEY": files.key, "CA": files.ca, "CAKEY": pki.folder / "ca.key"}
    given = [str(places.get(argument, argument)) for argument in arguments]
    result = CliRunner().invoke(app, ["serve", "--model", str(model_dir), "--listen", "127.0.0.1:0", *given])
    assert result.exit_code == 2
    assert told in " ".join(result.stderr.split())


@pytest.mark.parametrize("given", [(True, False, False), (True, True, False), (False, False, True)])
def test_some_of_the_three_files_are_none(given: tuple[bool, ...]) -> None:
    names = ("TRUNKLINE_TRUNK_CA", "TRUNKLINE_TRUNK_CERTIFICATE", "TRUNKLINE_TRUNK_KEY")
    environment = {name: "file" for name, there in zip(names, given, strict=True) if there}
    with pytest.raises(ConfigError, match="TLS to the trunk needs all three"):
        TlsFiles.from_environment(environment)
    assert TlsFiles.from_environment({}) is None
