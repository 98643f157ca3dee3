"""What routes share: a query that comes again is not taken apart again, and means the same."""

from collections.abc import Callable, Iterator
from typing import Annotated, Any

import pytest
from fastapi import APIRouter, Body, Cookie, Depends, FastAPI, Header, Query, Request
from fastapi.responses import JSONResponse
from fastapi.testclient import TestClient

from service import edge
from service.edge import RepeatedRoute
from service.errors import Forbidden
from service.keys import Key


class Service:
    """One route, and how often FastAPI took a request for it apart."""

    def __init__(self) -> None:
        self.taken_apart = 0
        router = APIRouter(route_class=RepeatedRoute)

        @router.get("/v1/asked", dependencies=[Depends(self._check)])
        async def asked(
            request: Request,
            number: Annotated[int, Query(ge=1)] = 1,
            deadline: Annotated[int | None, Header(alias="X-Deadline")] = None,
        ) -> JSONResponse:
            if number == 500:
                raise RuntimeError("of the endpoint")
            id = request.headers["X-Id"]
            return JSONResponse({"number": number, "deadline": deadline, "id": id})

        app = FastAPI()
        edge.add_errors(app)
        app.include_router(router)
        self.client = TestClient(_Identified(app), raise_server_exceptions=False)

    def ask(self, query: str = "", key: str = "admin", id: str = "1", **headers: str) -> Any:
        headers = {"X-Key": key, "X-Id": id} | headers
        return self.client.get(f"/v1/asked?{query}", headers=headers)

    def _check(self, request: Request) -> None:
        self.taken_apart += 1
        if request.state.key.scope == "inspect":
            raise Forbidden("not for this key")


class _Identified:
    """Takes a key's scope from a header."""

    def __init__(self, app: FastAPI) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            given = dict(scope["headers"])[b"x-key"].decode()
            scope["state"] = {"key": Key("somebody", given), "request_id": "1"}
        await self._app(scope, receive, send)


@pytest.fixture
def service() -> Iterator[Service]:
    service = Service()
    with service.client:
        yield service


def test_the_same_query_is_taken_apart_once_and_answered_each_time(service: Service) -> None:
    answers = [service.ask("number=2", id=id).json() for id in "abc"]

    assert answers == [{"number": 2, "deadline": None, "id": id} for id in "abc"]
    assert service.taken_apart == 1


def test_another_query_or_header_is_another_question(service: Service) -> None:
    queries = ("number=2", "number=3", "", "number=2")
    assert [service.ask(query).json()["number"] for query in queries] == [2, 3, 1, 2]
    headers: tuple[dict[str, str], ...] = ({"X-Deadline": "5"}, {"X-Deadline": "6"}, {})
    assert [service.ask(**header).json()["deadline"] for header in headers] == [5, 6, None]


def test_a_key_of_another_scope_is_looked_at_anew(service: Service) -> None:
    assert service.ask(key="admin").status_code == 200
    assert service.ask(key="inspect").status_code == 403
    assert service.ask(key="admin").status_code == 200
    assert service.ask(key="inspect").status_code == 403


@pytest.mark.parametrize("query", ["number=0", "number=x", "nummer=2", "number=2&number=0"])
def test_what_was_refused_is_refused_again(service: Service, query: str) -> None:
    assert service.ask("number=2").status_code == 200
    refusals = [service.ask(query).json() for _ in range(2)]

    assert refusals[0] == refusals[1]
    assert refusals[0]["status"] == 422


def test_so_many_queries_are_remembered_and_no_more(service: Service) -> None:
    for number in range(edge.MAX_REPEATED + 1):
        service.ask(f"number={number + 1}")
    made = service.taken_apart

    for kept in (2, edge.MAX_REPEATED + 1):
        service.ask(f"number={kept}")
    assert service.taken_apart == made
    service.ask("number=1")  # the oldest
    assert service.taken_apart == made + 1


def test_what_failed_is_taken_apart_again(service: Service) -> None:
    assert service.ask("number=500").status_code == 500
    assert service.ask("number=500").status_code == 500
    assert service.taken_apart == 2


def by_path(request: Request, name: str) -> None: ...
def by_cookie(request: Request, name: Annotated[str, Cookie()]) -> None: ...
def by_body(request: Request, name: Annotated[str, Body()]) -> None: ...
def named(name: Annotated[str, Header()]) -> None: ...
def by_dependency(request: Request, name: Annotated[None, Depends(named)]) -> None: ...


@pytest.mark.parametrize("endpoint", [by_path, by_cookie, by_body, by_dependency])
def test_a_route_whose_answer_hangs_on_more_than_its_query_is_none_to_repeat(
    endpoint: Callable[..., None],
) -> None:
    path = "/v1/{name}" if endpoint is by_path else "/v1/asked"
    with pytest.raises(TypeError, match="name may differ"):
        RepeatedRoute(path, endpoint)
