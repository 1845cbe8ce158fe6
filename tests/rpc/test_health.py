from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc
import grpc.aio
import pytest
from grpc import StatusCode
from grpc_health.v1 import health_pb2, health_pb2_grpc
from lowbit.server.rpc import server as server_module
from serving import Rig, make_rig, running

STATES = health_pb2.HealthCheckResponse
SERVICES = ["", "lowbit.v1.GenerationService"]


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    async with running(make_rig()) as rig:
        yield rig


@pytest.fixture
async def health(rig: Rig) -> AsyncIterator[health_pb2_grpc.HealthStub]:
    async with grpc.aio.insecure_channel(rig.address) as channel:
        yield health_pb2_grpc.HealthStub(channel)


@pytest.mark.parametrize("service", SERVICES)
async def test_check(rig: Rig, health: health_pb2_grpc.HealthStub, service: str) -> None:
    request = health_pb2.HealthCheckRequest(service=service)
    assert (await health.Check(request)).status == STATES.SERVING
    await rig.server.drain()
    assert (await health.Check(request)).status == STATES.NOT_SERVING


async def test_an_unknown_service(health: health_pb2_grpc.HealthStub) -> None:
    request = health_pb2.HealthCheckRequest(service="lowbit.v2.Nothing")
    with pytest.raises(grpc.aio.AioRpcError, match=r"lowbit\.v2\.Nothing") as caught:
        await health.Check(request)
    assert caught.value.code() is StatusCode.NOT_FOUND
    watch = health.Watch(request)
    assert (await watch.read()).status == STATES.SERVICE_UNKNOWN
    watch.cancel()


@pytest.mark.parametrize("service", SERVICES)
async def test_watchers_see_every_change_also_when_another_one_left(
    rig: Rig, health: health_pb2_grpc.HealthStub, service: str
) -> None:
    request = health_pb2.HealthCheckRequest(service=service)
    watches = [health.Watch(request) for _ in range(3)]
    assert {(await watch.read()).status for watch in watches} == {STATES.SERVING}
    leaver, *watchers = watches
    leaver.cancel()
    await asyncio.wait({asyncio.ensure_future(leaver.code())})
    await asyncio.sleep(0.05)  # for the server to notice
    await rig.server.drain()
    for watch in watchers:
        response = await asyncio.wait_for(watch.read(), 5)
        assert response.status == STATES.NOT_SERVING
        watch.cancel()


async def test_a_dead_engine_is_not_serving(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "_HEALTH_CHECK_SECONDS", 0.01)
    async with (
        running(make_rig()) as rig,
        grpc.aio.insecure_channel(rig.address) as channel,
    ):
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == STATES.SERVING
        await rig.engine.stop()
        assert (await asyncio.wait_for(watch.read(), 5)).status == STATES.NOT_SERVING
        watch.cancel()
