"""The page on which people vote, served on this machine alone.

The address contains a random token, without which every request is refused, and the page asks nothing of any other
host. One thread serves it while the search waits in another (see `Ballot`).
"""

import asyncio
import json
import secrets
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.resources import files
from importlib.util import find_spec
from typing import Any

from evojax_merge.errors import InputError, printable
from evojax_merge.judge.activity import Activity
from evojax_merge.judge.ballot import Ballot, Question
from evojax_merge.judge.votes import CHOICES

HOST = "127.0.0.1"
# The characters of a judge's name, and of an answer that is shown at first.
MAX_NAME = 100
MAX_BODY = 10_000
# Seconds that the page is still served after the search's end, so that judges who wait see it.
FAREWELL = 1.5
# Nothing but the page's own script and style; nobody frames it, and its address goes to nobody else. (Without any
# referrer, browsers would send the origin of some of its own requests as "null".)
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "Referrer-Policy": "same-origin", "X-Content-Type-Options": "nosniff", "Cache-Control": "no-store",
}  # fmt: skip
TYPES = {
    "judge.html": "text/html; charset=utf-8", "answers.js": "text/javascript", "judge.js": "text/javascript",
    "judge.css": "text/css",
}  # fmt: skip


@contextmanager
def served(
    ballots: Sequence[Ballot], port: int = 0, token: str | None = None, activity: Activity | None = None
) -> Iterator[str]:
    """Serve the page of these ballots while the block runs, and yield its address. token: of the address; activity:
    what the search does. Where the block ends well, the page says so. Raises InputError as `listen` does."""
    listening = listen(port)
    import uvicorn

    token = token or secrets.token_urlsafe(16)
    activity = activity or Activity()
    app = application(ballots, token, activity)
    # The terminal is the search's: nothing that a stranger sends is printed on it.
    server = uvicorn.Server(uvicorn.Config(
        app, http="h11", ws="none", lifespan="off", log_config=None, log_level="critical", access_log=False,
        proxy_headers=False, timeout_graceful_shutdown=1,
    ))  # fmt: skip
    thread = threading.Thread(target=_serve, args=(server, listening, ballots), daemon=True)
    thread.start()
    try:
        yield f"http://{HOST}:{listening.getsockname()[1]}/{token}/"
        activity.has_ended = True
        time.sleep(FAREWELL)
    finally:
        server.should_exit = True
        thread.join(timeout=5)
        listening.close()


def listen(port: int) -> socket.socket:
    """A socket on a port; 0: any that is free. Raises InputError where it is in use, or packages are missing."""
    if find_spec("uvicorn") is None or find_spec("starlette") is None:
        what = "the page of judges needs the packages starlette and uvicorn; pip install 'evojax-merge[judge]'"
        raise InputError("judge", what)
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((HOST, port))
        listening.listen()
    except OSError as error:
        listening.close()
        what = f"{port} cannot be listened on ({error.strerror}); choose another, or leave it out for any that is free"
        raise InputError("--port", what) from None
    return listening


def _serve(server: Any, listening: socket.socket, ballots: Sequence[Ballot]) -> None:
    async def serve() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)
        await server.serve(sockets=[listening])

    try:
        asyncio.run(serve())
    except BaseException as error:
        for ballot in ballots:
            ballot.stop(error)


def application(ballots: Sequence[Ballot], token: str, activity: Activity) -> Any:
    """The page as an ASGI application, at `/TOKEN/`."""
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import Response
    from starlette.routing import Route

    def allowed(request: Request) -> bool:
        # Browsers send the origin of a page with its requests. The host is one of ours (see `allowed_hosts`).
        own_origin = f"http://{request.headers.get('host')}"
        is_own = request.headers.get("origin", own_origin) == own_origin
        return is_own and secrets.compare_digest(request.path_params["token"].encode(), token.encode())

    async def body_of(request: Request) -> bytes | None:
        """The body of a request; None where it is cut off, or over MAX_BODY bytes, of which no more are read."""
        body = b""
        try:
            async for part in request.stream():
                body += part
                if len(body) > MAX_BODY:
                    return None
        except ClientDisconnect:
            return None
        return body

    def answer(row: dict[str, Any]) -> Response:
        # In ASCII: a name may hold half of a surrogate pair, which UTF-8 does not have.
        return Response(json.dumps(row), 200, HEADERS, media_type="application/json")

    async def page(request: Request) -> Response:
        name = request.path_params.get("name", "judge.html")
        if not allowed(request) or name not in TYPES:
            return Response("not found", 404, HEADERS)
        content = files(__package__).joinpath(name).read_bytes()
        return Response(content, 200, HEADERS, media_type=TYPES[name])

    async def picture(request: Request) -> Response:
        content, name = None, request.path_params["name"]
        if allowed(request):
            pictures = (ballot.picture(name) for ballot in ballots)
            content = await run_in_threadpool(next, filter(None, pictures), None)
        if content is None:
            return Response("not found", 404, HEADERS)
        return Response(content, 200, HEADERS, media_type="image/png")

    async def state(request: Request) -> Response:
        if not allowed(request):
            return Response("not found", 404, HEADERS)
        judge, earlier = (request.query_params.get(key, "")[:MAX_NAME] for key in ("judge", "earlier"))
        return answer(await run_in_threadpool(_state, ballots, judge, earlier) | activity.state())

    async def leave(request: Request) -> Response:
        if not allowed(request):
            return Response("not found", 404, HEADERS)
        for ballot in ballots:
            await run_in_threadpool(ballot.leave, request.query_params.get("judge", "")[:MAX_NAME])
        return Response(status_code=204, headers=HEADERS)

    async def vote(request: Request) -> Response:
        # A form of another site cannot send JSON to us without asking first, which nothing here answers.
        if not allowed(request) or request.headers.get("content-type") != "application/json":
            return Response("not found", 404, HEADERS)
        body = await body_of(request)
        try:
            row: Any = None if body is None else json.loads(body)
            number, choice, judge = int(row["number"]), row["choice"], str(row["judge"])[:MAX_NAME]
            ballot = ballots[int(row["task"])]
        except (ValueError, TypeError, KeyError, IndexError, OverflowError, RecursionError):
            return Response("expected task, number, choice and judge", 400, HEADERS | {"Connection": "close"})
        if choice not in CHOICES:
            return Response(f"choice: expected one of {', '.join(CHOICES)}", 400, HEADERS)
        try:
            counted = await run_in_threadpool(ballot.vote, number, choice, judge)
        except Exception as error:
            # The search says so: the server prints nothing.
            ballot.stop(error)
            return Response(printable(str(error)), 500, HEADERS)
        following = await run_in_threadpool(_state, ballots, judge)
        return answer({"counted": counted} | following | activity.state())

    return Starlette(
        routes=[
            Route("/{token}/", page),
            Route("/{token}/state", state),
            Route("/{token}/vote", vote, methods=["POST"]),
            Route("/{token}/leave", leave, methods=["POST"]),
            Route("/{token}/picture/{name}", picture),
            Route("/{token}/{name}", page),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])],
    )


def _state(ballots: Sequence[Ballot], judge: str, earlier: str = "") -> dict[str, Any]:
    """The next question of a judge, and the standing of the search. earlier: the name that the judge had before."""
    for ballot in ballots if earlier else ():
        ballot.hand_over(earlier, judge)
    standings = [ballot.standing() for ballot in ballots]
    questions = enumerate(ballot.question(judge) for ballot in ballots)
    number, question = next((each for each in questions if each[1] is not None), (None, None))
    if number is None:
        number = next((n for n, standing in enumerate(standings) if not standing["waiting"]), 0)
    ballot, voting = ballots[number], ballots[number].task.voting.config
    votes = [vote.choice for vote in ballot.bout(judge)] if voting.bout > 1 else []
    return {
        "title": voting.question,
        "question": None if question is None else _question(ballot, number, question),
        "standing": standings[number],
        "bout": {"votes": votes, "length": voting.bout} if votes else None,
    }


def _question(ballot: Ballot, number: int, question: Question) -> dict[str, Any]:
    pictures, voting = ballot.task.shows_pictures, ballot.task.voting.config
    left, right = (f"picture/{answer}" if pictures else answer for answer in (question.left, question.right))
    return {
        "task": number, "number": question.number, "question": voting.question, "prompt": question.prompt,
        "left": left, "right": right, "pictures": pictures,
    }  # fmt: skip
