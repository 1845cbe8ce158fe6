"""Who gets in, what each may have, and that nobody else is let in by mistake."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
import trustme
from google.rpc import error_details_pb2
from grpc import StatusCode
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status
from lowbit.proto import generation_pb2 as pb
from lowbit.proto import generation_pb2_grpc as pb_grpc
from lowbit.server.client import AsyncClient, Tls
from lowbit.server.config import InvalidConfig, ServerConfig
from lowbit.server.rpc import tenants
from lowbit.server.rpc.tenants import Quotas, Tenant, hash_key, new_key, read_tenants
from lowbit.server.types import Priority
from serving import RecitingRunner, Rig, make_rig, running

CONFIG = ServerConfig(port=0, metrics_port=0)
KEYS = {name: new_key() for name in ("acme", "small", "operator")}


def write_keys(path: Path, **keys: str) -> Path:
    keys = {**KEYS, **keys}
    path.write_text(
        f"""
        [tenants.acme]
        keys = ["{hash_key(keys["acme"])}"]
        [tenants.small]
        keys = ["{hash_key(keys["small"])}"]
        max_tokens = 5
        max_concurrent_requests = 1
        priority = "low"
        [tenants.operator]
        keys = ["{hash_key(keys["operator"])}"]
        control = true
        """
    )
    return path


@pytest.fixture
def keys_file(tmp_path: Path) -> Path:
    return write_keys(tmp_path / "keys.toml")


@pytest.fixture
async def rig(keys_file: Path) -> AsyncIterator[Rig]:
    async with running(make_rig(config=replace(CONFIG, api_keys=str(keys_file)))) as rig:
        yield rig
        await rig.wait_blocks_free()


async def refused(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


@pytest.mark.parametrize(
    "metadata",
    [
        (),
        (("authorization", "Bearer nobody's"),),
        (("authorization", KEYS["acme"]),),
        (("authorization", f"Basic {KEYS['acme']}"),),
        (("authorization", f"Bearer {KEYS['acme']}"), ("authorization", "Bearer x")),
        (("authorization", f"Bearer {hash_key(KEYS['acme'])}"),),
    ],
    ids=["none", "unknown", "no scheme", "other scheme", "two", "its hash"],
)
async def test_no_method_is_open_without_a_key(rig: Rig, metadata: Any) -> None:
    async with grpc.aio.insecure_channel(rig.address) as channel:
        for method in (
            "/lowbit.v1.GenerationService/Generate",
            "/lowbit.v1.GenerationService/Tokenize",
            "/lowbit.v1.ModelService/GetLoad",
            "/lowbit.v1.ControlService/Drain",
            "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
            "/no.such.Service/Method",
        ):
            error = await refused(channel.unary_unary(method)(b"", metadata=metadata))
            assert error.code() is StatusCode.UNAUTHENTICATED, method
        stream = channel.unary_stream("/lowbit.v1.GenerationService/GenerateStream")
        error = await refused(stream(b"", metadata=metadata).read())
        assert error.code() is StatusCode.UNAUTHENTICATED


async def test_health_is_open_unless_told_otherwise(rig: Rig, keys_file: Path) -> None:
    async with grpc.aio.insecure_channel(rig.address) as channel:
        check = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert check.status == health_pb2.HealthCheckResponse.SERVING
    config = replace(CONFIG, api_keys=str(keys_file), health_needs_key=True)
    async with (
        running(make_rig(config=config)) as closed,
        grpc.aio.insecure_channel(closed.address) as channel,
    ):
        stub = health_pb2_grpc.HealthStub(channel)
        error = await refused(stub.Check(health_pb2.HealthCheckRequest()))
        assert error.code() is StatusCode.UNAUTHENTICATED
        async with AsyncClient(closed.address, api_key=KEYS["acme"]) as client:
            await client.wait_until_serving(5)


async def test_reflection_can_be_off() -> None:
    async with (
        running(make_rig(config=replace(CONFIG, reflection=False))) as rig,
        grpc.aio.insecure_channel(rig.address) as channel,
    ):
        for version in ("v1", "v1alpha"):
            name = f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo"
            error = await refused(channel.unary_unary(name)(b""))
            assert error.code() is StatusCode.UNIMPLEMENTED


async def test_a_key_lets_in(rig: Rig) -> None:
    async with AsyncClient(rig.address, api_key=KEYS["acme"]) as client:
        assert (await client.generate("Hi")).text == "Hello, world!"
        assert "".join([delta.text async for delta in client.stream("Hi")]) == "Hello, world!"


async def test_control_needs_its_role(rig: Rig) -> None:
    async with grpc.aio.insecure_channel(rig.address) as channel:
        stub = pb_grpc.ControlServiceStub(channel)
        request = pb.AbortRequest(request_ids=["nobody's"])
        ours = (("authorization", f"Bearer {KEYS['acme']}"),)
        error = await refused(stub.Abort(request, metadata=ours))
        assert error.code() is StatusCode.PERMISSION_DENIED
        theirs = (("authorization", f"Bearer {KEYS['operator']}"),)
        response = await stub.Abort(request, metadata=theirs)
        assert response.results[0].outcome == pb.ABORT_OUTCOME_NOT_FOUND


async def test_a_tenants_limits(rig: Rig) -> None:
    rig.runner.endless, rig.runner.step_seconds = True, 0.001
    async with AsyncClient(rig.address, api_key=KEYS["small"], max_attempts=1) as client:
        assert (await client.generate("Hi")).usage.completion_tokens == 5
        error = await refused(client.generate("Hi", max_tokens=6))
        assert error.code() is StatusCode.INVALID_ARGUMENT
        assert "tenant small may have at most 5" in (error.details() or "")
        error = await refused(client.generate("Hi", priority=Priority.HIGH))
        assert error.code() is StatusCode.PERMISSION_DENIED
        error = await refused(client.generate("Hi", tenant="acme"))
        assert error.code() is StatusCode.PERMISSION_DENIED
        assert "tenant is 'acme'; the API key is that of 'small'" in (error.details() or "")


async def test_encoding_counts_as_a_request(tmp_path: Path) -> None:
    path, key = tmp_path / "keys.toml", new_key()
    path.write_text(f'[tenants.a]\nkeys = ["{hash_key(key)}"]\nrequests_per_minute = 3')
    async with (
        running(make_rig(config=replace(CONFIG, api_keys=str(path)))) as rig,
        AsyncClient(rig.address, api_key=key, max_attempts=1) as client,
    ):
        for _ in range(10):
            await client.load()  # costs nothing
        await client.tokenize("Hi")
        await client.detokenize([65])
        await client.generate("Hi")
        for call in (client.tokenize("Hi"), client.detokenize([65]), client.generate("Hi")):
            error = await refused(call)
            assert error.code() is StatusCode.RESOURCE_EXHAUSTED
            assert "requests_per_minute is 3" in (error.details() or "")
        await client.load()


async def test_too_many_at_once_is_told_with_what_google_has_for_it(keys_file: Path) -> None:
    runner = RecitingRunner(gated=True)
    rig = make_rig(runner, config=replace(CONFIG, api_keys=str(keys_file)))
    async with (
        running(rig),
        AsyncClient(rig.address, api_key=KEYS["small"], max_attempts=1) as client,
    ):
        first = asyncio.create_task(client.generate("Hi"))
        while rig.llm.scheduler.num_running == 0:
            await asyncio.sleep(0.001)
        error = await refused(client.generate("Hi"))
        assert error.code() is StatusCode.RESOURCE_EXHAUSTED
        details = {each.TypeName(): each for each in rpc_status_of(error).details}
        quota = error_details_pb2.QuotaFailure()
        assert details["google.rpc.QuotaFailure"].Unpack(quota)
        assert quota.violations[0].subject == "tenant:small"
        retry = error_details_pb2.RetryInfo()
        assert details["google.rpc.RetryInfo"].Unpack(retry)
        assert retry.retry_delay.seconds == 1
        info = error_details_pb2.ErrorInfo()
        assert details["google.rpc.ErrorInfo"].Unpack(info)
        assert (info.reason, info.domain) == ("QUOTA_EXCEEDED", "lowbit")
        runner.open()
        await first
        assert rig.ended("quota_exceeded") == 1


def rpc_status_of(error: grpc.aio.AioRpcError) -> Any:
    """What grpcio-status reads off a call, for an error of grpc.aio."""

    class Call:
        def trailing_metadata(self) -> Any:
            return error.trailing_metadata()

        def code(self) -> StatusCode:
            return error.code()

        def details(self) -> str:
            return error.details() or ""

    return rpc_status.from_call(Call())


def test_allowances_come_back_evenly() -> None:
    now = [0.0]
    quotas = Quotas(clock=lambda: now[0])
    tenant = Tenant(name="t", requests_per_minute=60, tokens_per_minute=600)
    for _ in range(60):
        with quotas.request(tenant):
            pass
    with pytest.raises(tenants.QuotaExceeded, match=r"1 more may be had in 1\.0 sec") as caught:
        quotas.request(tenant).__enter__()
    assert caught.value.retry_after_seconds == pytest.approx(1)
    now[0] = 1.0
    with quotas.request(tenant):
        pass
    quotas.take_prompt(tenant, 100)
    quotas.take_tokens(tenant, 600)  # a completion is counted when it has been made
    with pytest.raises(tenants.QuotaExceeded, match="tokens_per_minute is 600") as caught:
        quotas.take_prompt(tenant, 10)
    assert caught.value.retry_after_seconds == pytest.approx(11)
    now[0] += 11
    quotas.take_prompt(tenant, 10)
    now[0] += 60
    quotas.take_prompt(tenant, 5000)  # more than there ever is: all of it, and a debt


async def test_keys_are_read_again_when_they_change(
    rig: Rig, keys_file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tenants, "_RELOAD_SECONDS", 0)
    new = new_key()
    write_keys(keys_file, acme=new)
    async with AsyncClient(rig.address, api_key=KEYS["acme"]) as client:
        assert (await refused(client.generate("Hi"))).code() is StatusCode.UNAUTHENTICATED
    async with AsyncClient(rig.address, api_key=new) as client:
        assert (await client.generate("Hi")).text == "Hello, world!"
        keys_file.write_text("[tenants.acme]\nkeys = ['plain']")
        assert (await client.generate("Hi")).text == "Hello, world!"
        keys_file.unlink()
        assert (await client.generate("Hi")).text == "Hello, world!"
    assert "the keys stay as they were" in caplog.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[tenants.a]\nkeys = ['secret']", r"tenants\.a\.keys is \['secret'\]"),
        ("[tenants.a]\nmax_token = 1", r"tenants\.a\.max_token is not known"),
        ("[tenants.a]\nmax_tokens = 0", "max_tokens is 0; it must be a whole number"),
        ("[tenants.a]\nmax_tokens = true", "max_tokens is True"),
        ("[tenants.a]\npriority = 'urgent'", "must be one of high, normal, low"),
        ("[tenants.a]\nweight = nan", "weight is nan; it must be a positive number"),
        ("[tenants.a]\ncontrol = 1", "control is 1; it must be true or false"),
        ("", r"it must hold \[tenants\.NAME\] tables"),
        ("[keys]", r"it must hold \[tenants\.NAME\] tables"),
        ("no toml", "keys.toml"),
        (
            f"[tenants.a]\nkeys = ['{hash_key('x')}']\n[tenants.b]\nkeys = ['{hash_key('x')}']",
            "a key stands in it twice",
        ),
    ],
)
def test_a_bad_file_of_keys_is_one_clear_error(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(text)
    with pytest.raises(InvalidConfig, match=message):
        read_tenants(path)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "gpu7.example.com"])
def test_a_public_address_needs_tls_and_callers_names(host: str) -> None:
    tls = {"tls_certificate": "c", "tls_key": "k"}
    for settings, missing in (
        ({}, "without TLS .* and callers' keys"),
        (tls, "without callers' keys"),
        ({"api_keys": "f"}, "without TLS"),
    ):
        with pytest.raises(InvalidConfig, match=missing):
            ServerConfig(host=host, **settings)
    ServerConfig(host=host, **tls, api_keys="f")
    ServerConfig(host=host, **tls, tls_client_ca="ca")
    ServerConfig(host=host, allow_insecure=True)


async def test_control_is_not_served_to_strangers() -> None:
    config = replace(CONFIG, host="0.0.0.0", allow_insecure=True)
    async with (
        running(make_rig(config=config)) as rig,
        grpc.aio.insecure_channel(rig.address) as channel,
    ):
        error = await refused(pb_grpc.ControlServiceStub(channel).Drain(pb.DrainRequest()))
        assert error.code() is StatusCode.UNIMPLEMENTED


async def test_control_on_a_listener_of_its_own(tmp_path: Path) -> None:
    config = replace(CONFIG, control_host=f"unix:{tmp_path}/control")
    async with (
        running(make_rig(config=config)) as rig,
        grpc.aio.insecure_channel(rig.address) as public,
        grpc.aio.insecure_channel(f"unix:{tmp_path}/control") as private,
    ):
        error = await refused(pb_grpc.ControlServiceStub(public).Drain(pb.DrainRequest()))
        assert error.code() is StatusCode.UNIMPLEMENTED
        response = await pb_grpc.ControlServiceStub(private).Drain(pb.DrainRequest())
        assert response.num_unfinished == 0
        error = await refused(AsyncClient(rig.address, max_attempts=1).generate("Hi"))
        assert error.code() is StatusCode.UNAVAILABLE


# TLS


class Authority:
    """A certificate authority, and files of what it signed."""

    def __init__(self, folder: Path) -> None:
        self.ca = trustme.CA()
        self.folder = folder
        self.root = self.ca.cert_pem.bytes()
        self.ca.cert_pem.write_to_path(str(folder / "ca.pem"))

    def write_server(self) -> dict[str, str]:
        certificate = self.ca.issue_cert("127.0.0.1", "localhost")
        paths = {"tls_certificate": self.folder / "server.pem", "tls_key": self.folder / "key.pem"}
        for path, blob in zip(
            paths.values(),
            (certificate.cert_chain_pems[0], certificate.private_key_pem),
            strict=True,
        ):
            blob.write_to_path(str(path))
        return {name: str(path) for name, path in paths.items()}


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


async def test_tls(authority: Authority) -> None:
    config = replace(CONFIG, **authority.write_server())
    async with running(make_rig(config=config)) as rig:
        async with AsyncClient(rig.address, tls=Tls(root_certificates=authority.root)) as client:
            assert (await client.generate("Hi")).text == "Hello, world!"
        stranger = trustme.CA().cert_pem.bytes()
        for tls in (Tls(root_certificates=stranger), None):
            async with AsyncClient(rig.address, tls=tls, max_attempts=1) as client:
                error = await refused(client.generate("Hi", timeout_seconds=5))
                assert error.code() in (StatusCode.UNAVAILABLE, StatusCode.DEADLINE_EXCEEDED)


async def test_mutual_tls(authority: Authority) -> None:
    config = replace(
        CONFIG, **authority.write_server(), tls_client_ca=str(authority.folder / "ca.pem")
    )
    ours = authority.ca.issue_cert("client@example.com")
    theirs = trustme.CA().issue_cert("client@example.com")
    async with running(make_rig(config=config)) as rig:
        for certificate, is_let_in in ((ours, True), (theirs, False), (None, False)):
            tls = Tls(root_certificates=authority.root)
            if certificate is not None:
                tls = replace(
                    tls,
                    certificate_chain=certificate.cert_chain_pems[0].bytes(),
                    private_key=certificate.private_key_pem.bytes(),
                )
            async with AsyncClient(rig.address, tls=tls, max_attempts=1) as client:
                if is_let_in:
                    assert (await client.generate("Hi")).text == "Hello, world!"
                else:
                    error = await refused(client.generate("Hi", timeout_seconds=5))
                    assert error.code() is StatusCode.UNAVAILABLE


async def test_a_new_certificate_is_shown_without_a_restart(authority: Authority) -> None:
    config = replace(CONFIG, **authority.write_server())

    def shown(port: int) -> str:
        return ssl.get_server_certificate(("127.0.0.1", port))

    async with running(make_rig(config=config)) as rig:
        tls = Tls(root_certificates=authority.root)
        async with AsyncClient(rig.address, tls=tls) as client:
            before = await asyncio.to_thread(shown, rig.server.port)
            authority.write_server()
            after = await asyncio.to_thread(shown, rig.server.port)
            assert before != after
            Path(config.tls_certificate).write_text("nonsense")
            with suppress(ssl.SSLError):
                assert await asyncio.to_thread(shown, rig.server.port) == after
            assert (await client.generate("Hi")).text == "Hello, world!"


def test_files_that_are_not_there() -> None:
    config = replace(CONFIG, tls_certificate="/nowhere/c.pem", tls_key="/nowhere/k.pem")

    async def start() -> None:
        async with running(make_rig(config=config)):
            pass

    with pytest.raises(InvalidConfig, match="/nowhere/c"):
        asyncio.run(start())
    with pytest.raises(InvalidConfig, match=r"api_keys: /nowhere/keys\.toml"):
        make_rig(config=replace(CONFIG, api_keys="/nowhere/keys.toml"))


# Addresses


async def test_a_unix_socket(tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/socket"
    for _ in range(2):  # what a server left behind is in nobody's way
        rig = make_rig(config=replace(CONFIG, host=address))
        async with running(rig), AsyncClient(rig.server.address) as client:
            assert (await client.generate("Hi")).text == "Hello, world!"


async def test_ipv6() -> None:
    rig = make_rig(config=replace(CONFIG, host="::1"))
    async with running(rig), AsyncClient(rig.server.address) as client:
        assert (await client.generate("Hi")).text == "Hello, world!"
