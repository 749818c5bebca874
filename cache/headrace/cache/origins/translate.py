"""The one place where other libraries' errors become ours.

obstore, fsspec's filesystems (aiohttp, botocore, oss2), huggingface_hub, requests and the operating
system each have their own errors. They are recognised here by class name, HTTP status and the
service's error code, so that none of those libraries has to be imported. The texts are ours: a
foreign text may hold a signed URL or a token, so at most its status and code are quoted.

What becomes `OriginUnavailable` is what `RetryingOrigin` tries again; nothing else is.
"""

from __future__ import annotations

import errno
import http
import re
import ssl
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from headrace.cache.errors import (
    AccessDenied,
    HeadraceError,
    MissingDependency,
    NotFound,
    OriginChanged,
    OriginError,
    OriginMisconfigured,
    OriginUnavailable,
)

_STATUS = re.compile(r"status code: (\d{3})\b|\bstatus: (\d{3})\b|\b(\d{3}) (?:Client|Server) Error")
_CODE = re.compile(r"<Code>\s*([A-Za-z0-9_.]{1,80})\s*</Code>")
_CODE_NAME = re.compile(r"[A-Za-z0-9_.]{1,80}")

_CREDENTIALS_HINT = {
    "s3": "check AWS_ACCESS_KEY_ID, AWS_PROFILE or the pod's role, and the bucket's policy",
    "gs": "check GOOGLE_APPLICATION_CREDENTIALS or the service account, and its role on the bucket",
    "az": "check the AZURE_STORAGE_* variables or the workload identity, and its role on the container",
    "oss": "check OSS_ACCESS_KEY_ID, OSS_ACCESS_KEY_SECRET and OSS_SECURITY_TOKEN, and the bucket's policy",
    "hf": "check HF_TOKEN, and that its account may read this repository",
    "file": "check the file's owner and mode",
}
_PLACE_HINT = {
    "s3": "check AWS_REGION and AWS_ENDPOINT_URL",
    "gs": "check GOOGLE_BASE_URL",
    "az": "check AZURE_STORAGE_ENDPOINT and the account name",
    "oss": "check OSS_ENDPOINT and OSS_REGION",
    "hf": "check HF_ENDPOINT",
}

_NOT_FOUND = frozenset(
    {"FileNotFoundError", "NotADirectoryError", "NotFoundError", "NoSuchKey", "NoSuchBucket"}
    | {"NoSuchContainer", "ContainerNotFound", "BlobNotFound", "NoSuchUpload", "NoSuchVersion"}
    | {"EntryNotFoundError", "RevisionNotFoundError", "RepositoryNotFoundError", "LocalEntryNotFoundError"}
)
_EXPIRED = frozenset(
    {"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "SecurityTokenExpired"}
    | {"InvalidSecurityToken", "UnauthorizedSSOTokenError", "SSOTokenLoadError", "TokenRetrievalError"}
    | {"RefreshError", "CredentialRetrievalError"}
)
_NO_CREDENTIALS = frozenset({"NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError"})
_DENIED = frozenset(
    {"PermissionError", "PermissionDeniedError", "UnauthenticatedError", "AccessDenied", "AllAccessDisabled"}
    | {
        "InvalidAccessKeyId",
        "SignatureDoesNotMatch",
        "GatedRepoError",
        "InvalidToken",
        "AuthenticationFailed",
    }
    | {"AuthorizationFailure", "InvalidAuthenticationInfo", "Forbidden", "AccessForbidden"}
)
_CLOCK = frozenset({"RequestTimeTooSkewed", "RequestExpired"})
_MISPLACED = frozenset(
    {"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"}
    | {"InvalidRegion", "TemporaryRedirect", "AccessDeniedForEndpoint"}
)
_TRANSIENT = frozenset(
    {"SlowDown", "RequestTimeout", "RequestTimeoutException", "InternalError", "ServiceUnavailable"}
    | {"ServerBusy", "OperationTimedOut", "Throttling", "ThrottlingException", "TooManyRequests"}
    | {"TimeoutError", "Timeout", "ConnectionError", "ConnectTimeout", "ReadTimeout", "ConnectTimeoutError"}
    | {"ReadTimeoutError", "EndpointConnectionError", "ConnectionClosedError", "IncompleteReadError"}
    | {"ClientConnectionError", "ClientPayloadError", "ServerDisconnectedError", "ClientOSError"}
    | {"ChunkedEncodingError", "IncompleteRead", "RemoteProtocolError", "ConnectError", "ReadError"}
    | {"TransportError", "RequestError", "HTTPClientError", "FSTimeoutError", "InconsistentError"}
    | {"gaierror", "IncompleteBody", "ProtocolError", "OfflineModeIsEnabled"}
)
_TRANSIENT_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504, 509, 529})
_TRANSIENT_ERRNO = frozenset(
    {errno.ECONNRESET, errno.ECONNREFUSED, errno.ECONNABORTED, errno.EPIPE, errno.ETIMEDOUT, errno.EIO}
    | {errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ESTALE, errno.EAGAIN, errno.EMFILE, errno.ENFILE}
)
_UNTRUSTED = ("certificate verify failed", "invalid peer certificate", "UnknownIssuer", "CertificateRequired")
_NOT_TLS = ("wrong version number", "InvalidContentType", "corrupt message", "record layer failure")
_NO_NAME = (
    "dns error",
    "Name or service not known",
    "name resolution",
    "getaddrinfo",
    "nodename nor servname",
)
_METADATA_SERVICES = ("169.254.169.254", "/latest/api/token", "/latest/meta-data", "computeMetadata")
_RANGES_IGNORED = ("non-partial response", "NotPartial", "RangeNotSupported", "Range request not supported")


class WrongRange(OriginUnavailable):
    """An answer with another range than asked: a slip of the server, or the object became shorter."""


class NoLength(OriginMisconfigured):
    """An answer that does not say how long it is: a page that is made on the way, not a file."""


@dataclass(frozen=True, slots=True)
class _Facts:
    """What can be told about a foreign error."""

    names: frozenset[str]
    status: int | None
    code: str | None
    text: str
    numbers: frozenset[int]
    retry_after: float | None

    def any(self, *wanted: str) -> bool:
        return any(part in self.text for part in wanted)


def foreign(error: BaseException, uri: str) -> HeadraceError:
    """Our error for `error`, which arose at `uri` (without secrets: it is quoted).

    Returns an error of ours unchanged. Raise the result `from None` where the foreign text may hold
    a signed URL.
    """
    if isinstance(error, HeadraceError):
        return error
    facts = _facts(error)
    scheme = uri.partition("://")[0]
    return (
        _refused(facts, uri, scheme)
        or _misplaced(facts, uri, scheme)
        or _absent(facts, uri)
        or _transient(facts, uri, scheme)
        or _otherwise(error, facts, uri)
    )


def _refused(facts: _Facts, uri: str, scheme: str) -> HeadraceError | None:
    hint = _CREDENTIALS_HINT.get(scheme, "check the credentials for this server")
    said = _said(facts)
    if facts.any(
        "External AWS credential provider", "External GCP credential provider", "credential provider:"
    ):
        return AccessDenied(f"the credentials for {uri} could not be obtained: renew the login, or {hint}.")
    if facts.names & _NO_CREDENTIALS or facts.any(*_METADATA_SERVICES):
        # The last link of each cloud's chain is the instance's metadata service.
        return AccessDenied(
            f"no credentials were found for {uri}: {hint}, or set the origin's option `anonymous` for public data."
        )
    if facts.names & _EXPIRED:
        return AccessDenied(f"the credentials for {uri} have expired{said}: renew them and run this again.")
    if facts.names & _CLOCK:
        return AccessDenied(
            f"the origin refused {uri} because of the time in the request{said}: set this machine's clock."
        )
    if facts.names & _MISPLACED:
        return None
    if (
        facts.names & _DENIED
        or facts.status in (401, 403, 407)
        or facts.numbers & {errno.EACCES, errno.EPERM}
    ):
        return AccessDenied(f"access to {uri} was denied{said}: {hint}.")
    return None


def _misplaced(facts: _Facts, uri: str, scheme: str) -> HeadraceError | None:
    hint = _PLACE_HINT.get(scheme, "check the URL")
    if (
        facts.status in (301, 302, 307, 308)
        or facts.names & _MISPLACED
        or facts.any("redirect without LOCATION")
    ):
        return OriginMisconfigured(f"{uri} is not served by this region or endpoint{_said(facts)}: {hint}.")
    if facts.any(*_RANGES_IGNORED):
        return OriginMisconfigured(
            f"the server of {uri} ignores byte ranges and answered with the whole file: "
            "use a server or proxy that supports Range requests."
        )
    if facts.any("MissingContentLength"):
        return NoLength(
            f"the server does not say how long {uri} is: use a server that serves it as a plain file."
        )
    if facts.any(*_UNTRUSTED) or "ClientConnectorCertificateError" in facts.names:
        return OriginMisconfigured(
            f"the certificate of the server of {uri} is not trusted: "
            "name its authority in the origin's option `ca_bundle` or in SSL_CERT_FILE."
        )
    if facts.any(*_NOT_TLS):
        return OriginMisconfigured(
            f"the server of {uri} does not speak TLS: {hint}, and whether it should be http://."
        )
    if facts.any("URL scheme is not allowed", "invalid URL", "builder error", "relative URL without a base"):
        return OriginMisconfigured(f"the endpoint for {uri} is not a usable URL: {hint}.")
    return None


def _absent(facts: _Facts, uri: str) -> HeadraceError | None:
    if "PreconditionError" in facts.names or facts.status == 412:
        return OriginChanged(
            f"{uri} is no longer the version that was listed{_said(facts)}: run this again to take the new one."
        )
    if facts.status == 416:
        return OriginChanged(
            f"{uri} is shorter than when it was listed{_said(facts)}: run this again to take the new version."
        )
    if facts.names & _NOT_FOUND or facts.status in (404, 410):
        if facts.names & {"NoSuchBucket", "NoSuchContainer", "ContainerNotFound"}:
            return NotFound(
                f"the bucket of {uri} does not exist{_said(facts)}: check its name and the endpoint."
            )
        return NotFound(f"{uri} does not exist{_said(facts)}: check the path.")
    return None


def _transient(facts: _Facts, uri: str, scheme: str) -> HeadraceError | None:
    wait = facts.retry_after
    if facts.any(*_NO_NAME) or "gaierror" in facts.names:
        hint = _PLACE_HINT.get(scheme, "check the URL")
        return OriginUnavailable(f"the host name of {uri} cannot be resolved: {hint}, and the network.", wait)
    if facts.status in _TRANSIENT_STATUS or facts.names & (_TRANSIENT - {"TimeoutError", "ConnectionError"}):
        return OriginUnavailable(f"{_failing(facts)} at {uri}{_said(facts)}.", wait)
    if facts.names & _TRANSIENT or facts.numbers & _TRANSIENT_ERRNO:
        return OriginUnavailable(f"{_failing(facts)} at {uri}.", wait)
    if facts.any("HttpError {", "Http(", "error sending request", "request or response body error"):
        return OriginUnavailable(f"{_failing(facts)} at {uri}.", wait)
    if facts.any("UnexpectedRange"):
        return WrongRange(f"the server answered with another range than asked at {uri}.", wait)
    return None


def _otherwise(error: BaseException, facts: _Facts, uri: str) -> HeadraceError:
    if isinstance(error, ImportError):
        return MissingDependency(f"reading {uri} needs the library {error.name}: pip install {error.name}.")
    if facts.status is not None:
        return OriginError(
            f"the origin refused the request for {uri}{_said(facts)}: check that it is the right kind of server."
        )
    return OriginError(f"reading {uri} failed with {type(error).__name__}: run with --verbose for its text.")


def _failing(facts: _Facts) -> str:
    """What failed, for a transient failure."""
    if facts.status is not None:
        return "the origin could not answer"
    for wanted, said in (
        (("Connection refused", "ConnectionRefused"), "the connection was refused"),
        (("Connection reset", "ConnectionReset", "SendRequest"), "the connection was reset"),
        (
            ("IncompleteBody", "IncompleteRead", "UnexpectedEof", "payload is not completed"),
            "the answer stopped midway",
        ),
        (("TimedOut", "timed out", "Timeout", "timeout"), "the origin did not answer in time"),
    ):
        if facts.any(*wanted) or facts.names & set(wanted):
            return said
    if "TimeoutError" in facts.names or errno.ETIMEDOUT in facts.numbers:
        return "the origin did not answer in time"
    return "the connection failed"


def _said(facts: _Facts) -> str:
    """ ", as the origin says: 403 Forbidden (AccessDenied)", in brackets, or nothing."""
    parts = []
    if facts.status is not None:
        try:
            parts.append(f"{facts.status} {http.HTTPStatus(facts.status).phrase}")
        except ValueError:
            parts.append(str(facts.status))
    if facts.code:
        parts.append(facts.code)
    return f" ({', '.join(parts)})" if parts else ""


def _facts(error: BaseException) -> _Facts:
    names: set[str] = set()
    numbers: set[int] = set()
    status: int | None = None
    code: str | None = None
    retry_after: float | None = None
    texts: list[str] = []
    for one in _chain(error):
        names |= {c.__name__ for c in type(one).__mro__ if c not in (object, BaseException, Exception)}
        text = str(one)
        texts.append(text)
        found_status, found_code, headers = _answer(one)
        match = _STATUS.search(text)
        if found_status is None and match:
            found_status = int(next(group for group in match.groups() if group))
        status = status if status is not None else found_status
        match = _CODE.search(text)
        code = code or found_code or (match[1] if match else None)
        retry_after = retry_after if retry_after is not None else _seconds(headers)
        if isinstance(one, OSError) and one.errno is not None and not isinstance(one, ssl.SSLError):
            numbers.add(one.errno)
    if code:
        names.add(code)
    return _Facts(frozenset(names), status, code, "\n".join(texts), frozenset(numbers), retry_after)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and what it was raised from (libraries wrap what the socket said)."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen and len(seen) < 8:
        seen.add(id(current))
        yield current
        current = current.__cause__


def _answer(error: BaseException) -> tuple[int | None, str | None, Mapping[str, object]]:
    """(status, code, headers) where the error carries the answer: botocore, aiohttp, requests, httpx, oss2."""
    status: object = getattr(error, "status", None)
    code: object = getattr(error, "__dict__", {}).get("code")  # aiohttp's is a deprecated property
    headers: object = getattr(error, "headers", None)
    response: object = getattr(error, "response", None)
    if isinstance(response, Mapping):  # botocore.ClientError
        metadata, detail = response.get("ResponseMetadata") or {}, response.get("Error") or {}
        status, code, headers = (
            metadata.get("HTTPStatusCode"),
            detail.get("Code"),
            metadata.get("HTTPHeaders"),
        )
    elif response is not None:
        status = getattr(response, "status_code", status)
        headers = getattr(response, "headers", headers)
    return (
        status if isinstance(status, int) and 100 <= status < 600 else None,
        code if isinstance(code, str) and _CODE_NAME.fullmatch(code) and not code.isdigit() else None,
        headers if isinstance(headers, Mapping) else {},
    )


def _seconds(headers: Mapping[str, object]) -> float | None:
    """Retry-After in its form of seconds; its form of a date is too coarse to wait for."""
    value = headers.get("Retry-After", headers.get("retry-after"))
    try:
        seconds = float(str(value))
    except ValueError:
        return None
    return seconds if 0 <= seconds < 3600 else None
