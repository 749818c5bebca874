"""Other libraries' errors become ours: by what they are, without repeating what they say."""

from __future__ import annotations

import email.message
import errno
import ssl
import urllib.error

import aiohttp
import botocore.exceptions
import pytest
import requests
from multidict import CIMultiDict, CIMultiDictProxy
from yarl import URL

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
from headrace.cache.origins import translate

URI = "s3://bucket/model/a.bin"


def amazon(status: int, code: str, headers: dict[str, str] | None = None) -> botocore.exceptions.ClientError:
    answer = {
        "Error": {"Code": code, "Message": "s3cret"},
        "ResponseMetadata": {"HTTPStatusCode": status, "HTTPHeaders": headers or {}},
    }
    return botocore.exceptions.ClientError(answer, "GetObject")


def aio(status: int, headers: dict[str, str] | None = None) -> aiohttp.ClientResponseError:
    known = CIMultiDictProxy(CIMultiDict(headers or {}))
    url = URL("http://host/a.bin?sig=s3cret")
    info = aiohttp.RequestInfo(url, "GET", CIMultiDictProxy(CIMultiDict()), url)
    return aiohttp.ClientResponseError(info, (), status=status, message="s3cret", headers=known)


def web(status: int) -> requests.HTTPError:
    response = requests.Response()
    response.status_code = status
    return requests.HTTPError("s3cret", response=response)


def standard(status: int) -> urllib.error.HTTPError:
    return urllib.error.HTTPError("http://h/?sig=s3cret", status, "s3cret", email.message.Message(), None)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (amazon(403, "AccessDenied"), AccessDenied),
        (amazon(400, "ExpiredToken"), AccessDenied),
        (amazon(403, "RequestTimeTooSkewed"), AccessDenied),
        (botocore.exceptions.NoCredentialsError(), AccessDenied),
        (amazon(404, "NoSuchKey"), NotFound),
        (amazon(404, "NoSuchBucket"), NotFound),
        (amazon(412, "PreconditionFailed"), OriginChanged),
        (amazon(416, "InvalidRange"), OriginChanged),
        (amazon(301, "PermanentRedirect"), OriginMisconfigured),
        (amazon(400, "AuthorizationHeaderMalformed"), OriginMisconfigured),
        (amazon(503, "SlowDown"), OriginUnavailable),
        (amazon(400, "RequestTimeout"), OriginUnavailable),
        (botocore.exceptions.EndpointConnectionError(endpoint_url="http://s3cret"), OriginUnavailable),
        (botocore.exceptions.ReadTimeoutError(endpoint_url="http://s3cret"), OriginUnavailable),
        (amazon(400, "InvalidArgument"), OriginError),
        (aio(401), AccessDenied),
        (aio(404), NotFound),
        (aio(502), OriginUnavailable),
        (aiohttp.ServerDisconnectedError(), OriginUnavailable),
        (aiohttp.ClientPayloadError("s3cret"), OriginUnavailable),
        (web(403), AccessDenied),
        (web(429), OriginUnavailable),
        (requests.ConnectionError("s3cret"), OriginUnavailable),
        (requests.Timeout("s3cret"), OriginUnavailable),
        (FileNotFoundError(errno.ENOENT, "s3cret"), NotFound),
        (PermissionError(errno.EACCES, "s3cret"), AccessDenied),
        (ConnectionResetError(errno.ECONNRESET, "s3cret"), OriginUnavailable),
        (OSError(errno.EIO, "s3cret"), OriginUnavailable),
        (TimeoutError(), OriginUnavailable),
        (ssl.SSLCertVerificationError(1, "certificate verify failed: s3cret"), OriginMisconfigured),
        (ModuleNotFoundError("No module named 'gcsfs'", name="gcsfs"), MissingDependency),
        (RuntimeError("s3cret"), OriginError),
    ],
    ids=lambda p: f"{type(p).__name__}" if isinstance(p, Exception) else "",
)
def test_a_foreign_error_becomes_one_sentence_of_ours(error: Exception, kind: type[HeadraceError]) -> None:
    ours = translate.foreign(error, URI)
    assert type(ours) is kind
    assert URI in str(ours)
    assert str(ours).endswith(".")
    assert "s3cret" not in str(ours)


@pytest.mark.parametrize("status", [403, 404, 500])
def test_the_standard_librarys_errors_are_known_by_status(status: int) -> None:
    kinds = {403: AccessDenied, 404: NotFound, 500: OriginUnavailable}
    with standard(status) as error:
        assert type(translate.foreign(error, URI)) is kinds[status]


def test_what_an_error_was_raised_from_counts_too() -> None:
    outer = RuntimeError("the file system failed")
    outer.__cause__ = ConnectionRefusedError(errno.ECONNREFUSED, "no")
    assert isinstance(translate.foreign(outer, URI), OriginUnavailable)


def test_the_wait_that_the_server_asks_for_is_kept() -> None:
    for error in (aio(503, {"Retry-After": "7"}), amazon(503, "SlowDown", {"retry-after": "7"})):
        ours = translate.foreign(error, URI)
        assert isinstance(ours, OriginUnavailable)
        assert ours.retry_after == 7.0


def test_our_own_errors_pass_unchanged() -> None:
    error = OriginChanged("changed.")
    assert translate.foreign(error, URI) is error


def test_hints_speak_of_the_origin_at_hand() -> None:
    for uri, hint in (
        ("hf://org/m", "HF_TOKEN"),
        ("oss://b/m", "OSS_ACCESS_KEY_ID"),
        ("gs://b/m", "GOOGLE_"),
    ):
        assert hint in str(translate.foreign(aio(403), uri))
