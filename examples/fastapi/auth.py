"""The user of a request, from a signed bearer token. Keep `current_user`, and let your identity provider sign."""

import os
from datetime import UTC, datetime, timedelta
from typing import Annotated

import jwt
from fastapi import Depends, HTTPException
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

GUEST = "guest-"
SECRET_KEY = os.environ["SECRET_KEY"]

Credentials = Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))]


def sign(user_id: str) -> str:
    """Return a token for a user, valid for 30 days."""
    now = datetime.now(UTC)
    claims = {"sub": user_id, "iat": now, "exp": now + timedelta(days=30)}
    return jwt.encode(claims, SECRET_KEY, algorithm="HS256")


def optional_user(credentials: Credentials) -> str | None:
    """Return the user of a valid token, or None."""
    try:
        token = credentials.credentials if credentials else ""
        claims = jwt.decode(token, SECRET_KEY, algorithms=["HS256"], options={"require": ["exp", "iat", "sub"]})
    except jwt.InvalidTokenError:
        return None
    return str(claims["sub"])


def current_user(user_id: Annotated[str | None, Depends(optional_user)]) -> str:
    """Return the user of a valid token; all other requests get 401."""
    if not user_id:
        raise HTTPException(401, "The token is missing, invalid or expired.", {"WWW-Authenticate": "Bearer"})
    return user_id


User = Annotated[str, Depends(current_user)]
OptionalUser = Annotated[str | None, Depends(optional_user)]
