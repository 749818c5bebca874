"""How to talk to an origin: where, as whom, through what, and how patiently.

The process environment is read here and nowhere else in the origins; what a configuration file
says about an origin's prefix is laid over it with `dataclasses.replace`. Credentials are not in
here: each cloud's own chain finds them when they are needed (`origins/credentials.py`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from headrace.cache.errors import UsageError

# The first variable that is set wins. The spellings are those of each cloud's own tools.
_ENDPOINTS: Mapping[str, tuple[str, ...]] = {
    "s3": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"),
    "gs": ("GOOGLE_BASE_URL", "STORAGE_EMULATOR_HOST"),
    "az": ("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT"),
    "oss": ("OSS_ENDPOINT",),
    "hf": ("HF_ENDPOINT",),
}
_REGIONS: Mapping[str, tuple[str, ...]] = {
    "s3": ("AWS_REGION", "AWS_DEFAULT_REGION"),
    "oss": ("OSS_REGION",),
}
_ANONYMOUS: Mapping[str, tuple[str, ...]] = {
    "s3": ("AWS_SKIP_SIGNATURE", "AWS_NO_SIGN_REQUEST"),
    "gs": ("GOOGLE_SKIP_SIGNATURE",),
    "az": ("AZURE_SKIP_SIGNATURE",),
}
_CA_BUNDLES = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
_TRUE = frozenset({"1", "true", "yes", "on", "requester"})


@dataclass(frozen=True, slots=True)
class OriginOptions:
    """Settings of one origin.

    Attributes:
        endpoint: base URL of the service, where it is not the cloud's own. Never with user:password.
        region: the bucket's region.
        anonymous: send no credentials (public buckets).
        requester_pays: accept the cost of reading a requester-pays bucket.
        virtual_hosted: the bucket is part of the endpoint's host name.
        profile: profile in the AWS configuration files; None takes the default chain.
        ca_bundle: PEM file of additional trusted certificates (a private CA).
        proxy: URL of an HTTP proxy; may carry a password, so it is kept out of `repr`.
        no_proxy: comma-separated hosts that are reached without the proxy.
        headers: (name, value) pairs sent with every request; may be secret, so kept out of `repr`.
        connect_timeout: seconds until a connection must stand.
        first_byte_timeout: seconds from the request to the first piece of the answer.
        stall_timeout: seconds between two pieces.
        attempts: how often one request is tried; 1 never retries.
        backoff_base: seconds; the n-th retry waits between 0 and base * 2**n ...
        backoff_max: ... but at most this many seconds, unless the server asks for longer.
    """

    endpoint: str | None = None
    region: str | None = None
    anonymous: bool = False
    requester_pays: bool = False
    virtual_hosted: bool | None = None
    profile: str | None = None
    ca_bundle: str | None = None
    proxy: str | None = field(default=None, repr=False)
    no_proxy: str | None = None
    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    connect_timeout: float = 5.0
    first_byte_timeout: float = 30.0
    stall_timeout: float = 30.0
    attempts: int = 6
    backoff_base: float = 0.1
    backoff_max: float = 10.0

    def __post_init__(self) -> None:
        if self.attempts < 1:
            raise UsageError(f"attempts must be at least 1, not {self.attempts}.")
        for name in ("connect_timeout", "first_byte_timeout", "stall_timeout"):
            if not getattr(self, name) > 0:
                raise UsageError(f"{name} must be more than 0 seconds, not {getattr(self, name)}.")
        if self.backoff_base < 0 or self.backoff_max < 0:
            raise UsageError("the backoff must not be negative.")

    @classmethod
    def from_env(cls, scheme: str, environ: Mapping[str, str] | None = None) -> OriginOptions:
        """What the environment says about origins of `scheme`.

        Args:
            scheme: canonical scheme of a reference, e.g. "s3".
            environ: the environment; `os.environ` when None.
        """
        env = os.environ if environ is None else environ
        endpoint = _first(env, _ENDPOINTS.get(scheme, ()))
        if endpoint is not None and scheme == "gs" and "://" not in endpoint:
            endpoint = f"http://{endpoint}"  # STORAGE_EMULATOR_HOST is host:port
        plain = scheme == "http" or (endpoint or "").startswith("http://")
        return cls(
            endpoint=endpoint,
            region=_first(env, _REGIONS.get(scheme, ())),
            anonymous=_flag(env, _ANONYMOUS.get(scheme, ())),
            requester_pays=_flag(env, ("AWS_REQUEST_PAYER",)) if scheme == "s3" else False,
            virtual_hosted=(
                _flag(env, ("AWS_VIRTUAL_HOSTED_STYLE_REQUEST",))
                if scheme == "s3" and env.get("AWS_VIRTUAL_HOSTED_STYLE_REQUEST")
                else None
            ),
            profile=_first(env, ("AWS_PROFILE", "AWS_DEFAULT_PROFILE")) if scheme == "s3" else None,
            ca_bundle=_first(env, ("AWS_CA_BUNDLE", *_CA_BUNDLES) if scheme == "s3" else _CA_BUNDLES),
            # HTTP_PROXY in capitals is not read: a CGI server sets it from a request header.
            proxy=_first(env, ("http_proxy",) if plain else ("HTTPS_PROXY", "https_proxy"))
            or _first(env, ("ALL_PROXY", "all_proxy")),
            no_proxy=_first(env, ("NO_PROXY", "no_proxy")),
        )


def _first(env: Mapping[str, str], names: tuple[str, ...]) -> str | None:
    return next((env[name] for name in names if env.get(name)), None)


def _flag(env: Mapping[str, str], names: tuple[str, ...]) -> bool:
    return (_first(env, names) or "").strip().lower() in _TRUE
