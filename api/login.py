"""/flower/login and /flower/logout: where a browser's user gives an API key for a session.

The key comes in a form's body, never in an address; the page needs no script.
"""

import re
import secrets
from html import escape
from urllib.parse import parse_qsl

from anyio import to_thread
from fastapi import APIRouter, Request
from starlette.responses import HTMLResponse, RedirectResponse, Response

from tuneyard.api.access import TheYard, admin_of, is_key
from tuneyard.api.sessions import PATH, give_form_token, is_own_form
from tuneyard.models.keys import hash_key
from tuneyard.specs.errors import Forbidden, InputError, TuneyardError, Unauthenticated

router = APIRouter(prefix=PATH, include_in_schema=False)

MAX_FIELDS = 10
NEXT = re.compile(r"(?!.*(?://|\.\.|\\))/flower/[\x21-\x7e]{0,1000}")
"""Where a login may lead on to: a page of Flower, and never another host."""

POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'; frame-ancestors 'none';"
    " base-uri 'none'"
)
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title} · Tuneyard</title>
<style>
:root {{ color-scheme: light dark; font: 1rem/1.5 system-ui, sans-serif }}
main {{ max-width: 22rem; margin: 15vh auto 0; padding: 0 1rem }}
h1 {{ font-size: 1.3rem }}
label, input, button {{ display: block; width: 100%; box-sizing: border-box; font: inherit }}
input, button {{ margin: .3rem 0 1rem; padding: .5rem }}
[role=alert] {{ border-left: .25rem solid #b42318; padding-left: .75rem }}
</style>
</head>
<body>
<main>
<h1>{title}</h1>
{said}<form method="post" action="{action}">
<input type="hidden" name="token" value="{token}">
{fields}
<button>{button}</button>
</form>
</main>
</body>
</html>
"""
LOGIN_FIELDS = """<input type="hidden" name="next" value="{next}">
<p>Flower shows the work of all teams. <code>tuneyard up</code> wrote such a key into
<code>profile.json</code> in its home.</p>
<label for="key">API key of an administrator</label>
<input id="key" name="key" type="password" required autofocus autocomplete="current-password">"""


@router.get("/login")
async def login_page(request: Request) -> Response:
    """The form that asks for the key."""
    return _login_form(request, _next(request.query_params.get("next", "")))


@router.post("/login")
async def login(request: Request, yard: TheYard) -> Response:
    """Begin a session, and lead on to the page that was asked for."""
    form = await _form(request)
    next_page = _next(form.get("next", ""))
    try:
        key = _key(request, form)
        await to_thread.run_sync(admin_of, yard, hash_key(key))
    except (Forbidden, Unauthenticated) as error:
        return _login_form(request, next_page, error)
    answer = RedirectResponse(next_page, 303)
    yard.sessions.begin(request.scope, answer, hash_key(key))
    return answer


@router.get("/logout")
async def logout_page(request: Request) -> Response:
    """The button that ends a session."""
    return _page(request, "Log out", action="logout", fields="", button="Log out")


@router.post("/logout")
async def logout(request: Request, yard: TheYard) -> Response:
    """End the session."""
    form = await _form(request)
    if not is_own_form(request.scope, form.get("token", "")):
        return _page(request, "Log out", action="logout", fields="", button="Log out", status=403)
    answer = RedirectResponse(f"{PATH}/login", 303)
    yard.sessions.end(request.scope, answer)
    return answer


def _key(request: Request, form: dict[str, str]) -> str:
    """The key of a form. Raises: Forbidden, Unauthenticated."""
    if not is_own_form(request.scope, form.get("token", "")):
        raise Forbidden("This form is too old, or not ours: give the key once more.")
    key = form.get("key", "").strip()
    if not is_key(key):
        raise Unauthenticated("This API key is not known.")
    return key


def _next(text: str) -> str:
    return text if NEXT.fullmatch(text) else f"{PATH}/"


async def _form(request: Request) -> dict[str, str]:
    """A form's fields. Raises: InputError."""
    text = (await request.body()).decode("utf-8", "replace")
    try:
        return dict(parse_qsl(text, keep_blank_values=True, max_num_fields=MAX_FIELDS))
    except ValueError:
        raise InputError("This form has too many fields.") from None


def _login_form(request: Request, next_page: str, error: TuneyardError | None = None) -> Response:
    return _page(
        request,
        "Log in",
        action="login",
        fields=LOGIN_FIELDS.format(next=escape(next_page)),
        button="Log in",
        said=error.message if error else "",
        status=error.http_status if error else 200,
    )


def _page(
    request: Request,
    title: str,
    *,
    action: str,
    fields: str,
    button: str,
    said: str = "",
    status: int = 200,
) -> Response:
    token = secrets.token_urlsafe(32)
    text = PAGE.format(
        title=title,
        action=f"{request.scope['root_path']}{PATH}/{action}",
        token=token,
        fields=fields,
        button=button,
        said=f'<p role="alert">{escape(said)}</p>\n' if said else "",
    )
    headers = {
        "Content-Security-Policy": POLICY,
        "Cache-Control": "no-store",
        "Referrer-Policy": "same-origin",
        "X-Content-Type-Options": "nosniff",
    }
    answer = HTMLResponse(text, status, headers)
    give_form_token(request.scope, answer, token)
    return answer
