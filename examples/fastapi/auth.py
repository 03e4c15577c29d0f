"""Who calls: a user id from a signed bearer token. Replace `sign` by your identity provider and keep `current_user`."""

import os
from datetime import UTC, datetime, timedelta
from typing import Annotated

import jwt
from fastapi import Depends, HTTPException
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

SECRET_KEY = os.environ["SECRET_KEY"]
LIFETIME = timedelta(days=30)
GUEST = "guest-"

Credentials = Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))]


def sign(user_id: str) -> str:
    """Return a token for a user."""
    now = datetime.now(UTC)
    return jwt.encode({"sub": user_id, "iat": now, "exp": now + LIFETIME}, SECRET_KEY, algorithm="HS256")


def optional_user(credentials: Credentials) -> str | None:
    """Return the user of a valid token, or None."""
    if credentials is None:
        return None
    try:
        claims = jwt.decode(
            credentials.credentials, SECRET_KEY, algorithms=["HS256"], options={"require": ["exp", "iat", "sub"]}
        )
    except jwt.InvalidTokenError:
        return None
    return str(claims["sub"])


def current_user(user_id: Annotated[str | None, Depends(optional_user)]) -> str:
    """Return the user of the request, or answer 401."""
    if not user_id:
        raise HTTPException(401, "Please sign in: the token is missing, invalid or expired.", {"WWW-Authenticate": "Bearer"})
    return user_id


User = Annotated[str, Depends(current_user)]
OptionalUser = Annotated[str | None, Depends(optional_user)]
